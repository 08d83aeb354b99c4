"""From targets to a report: workers are started, take turns, and are asked what they took."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.interleaving import Schedule, Series, ratio, sample_until_steady
from fdconv_deploy.latency.report import (
    Divergences,
    GpuState,
    LayerDivergence,
    LayerTime,
    Profile,
    Report,
    Row,
)
from fdconv_deploy.latency.targets import (
    Skipped,
    Target,
    UnavailableError,
    bundle_inputs,
    load_network,
    opened_bundle,
)
from fdconv_deploy.latency.workers import Worker
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime.backends.base import Phases
from fdconv_deploy.runtime.bundle import Bundle

if TYPE_CHECKING:
    from fdconv_deploy.profiling.onnx_profile import LayerTimes

FORMAT = 1
# What stays free when another worker is started.
SPARE = 300e6
# Runs of a profile that count.
PROFILED_RUNS = 10
# Told what is going on, and what share of all (0–1) is done at the most.
Progress = Callable[[str, float], None]


def _silent(text: str, share: float) -> None:
    pass


def measure(
    targets: Sequence[Target],
    schedule: Schedule,
    *,
    concurrency: Sequence[int] = (1,),
    skipped: Sequence[Skipped] = (),
    progress: Progress = _silent,
) -> Report:
    """Time every target.

    Targets of one batch size are alive together and take turns; batch sizes follow one another.

    Args:
        targets: what is timed.
        schedule: for how long.
        concurrency: requests at a time, each timed by itself.
        skipped: what the report says beside what cannot be opened.
        progress: see `Progress`.

    Raises:
        FDConvError: a target that was asked for by name cannot be had, or none can.
    """
    report = Report(
        kind="bench",
        format=FORMAT,
        machine=machine.describe(targets[0].options.threads),
        settings={**asdict(schedule), "concurrency": list(concurrency)},
        rows=[],
        skipped=[one._asdict() for one in skipped],
        others_cpu=None,
    )
    by_batch = groupby(sorted(targets, key=lambda one: one.batch), key=lambda one: one.batch)
    groups = [list(group) for _, group in by_batch]
    for number, group in enumerate(groups):

        def on_progress(text: str, share: float, number: int = number) -> None:
            progress(text, (number + share) / len(groups))

        _measure_group(group, schedule, concurrency, report, on_progress)
    if not report["rows"]:
        first = report["skipped"][0]
        raise FDConvError(f"Nothing could be timed. {first['what']}: {first['why']}")
    return report


def _measure_group(
    targets: Sequence[Target],
    schedule: Schedule,
    concurrency: Sequence[int],
    report: Report,
    progress: Progress,
) -> None:
    """Add rows of targets of one batch size to a report."""
    with ExitStack() as stack:
        workers: list[Worker] = []
        for target in targets:
            progress(f"opening {target.name}", 0.0)
            try:
                _check_memory(target, workers)
                workers.append(stack.enter_context(Worker(target)))
            except FDConvError as error:
                if target.named:
                    raise
                report["skipped"].append(Skipped(target.name, str(error))._asdict())
        if not workers:
            return
        series = [(worker, Series(worker, each)) for worker in workers for each in concurrency]
        batch = targets[0].batch

        def on_round(rounds: int, steady: int, seconds: float) -> None:
            text = f"batch {batch}: {rounds} rounds, {steady} of {len(series)} steady"
            progress(text, min(seconds / schedule.seconds, 1.0) if schedule.seconds else 1.0)

        progress(f"batch {batch}: warming up", 0.0)
        with machine.Bystanders(lambda: sum(worker.cpu_seconds for worker in workers)) as others:
            sample_until_steady([one for _, one in series], schedule, on_round)
        for worker, one in series:
            base, first = next(s for s in series if s[1].concurrency == one.concurrency)
            # An image of another size is another amount of work.
            alike = first is not one and _size(base) == _size(worker)
            report["rows"].append(_row(worker, one, first if alike else None))
        # A service's own work cannot be separated from that of others.
        if others.share is not None and all(target.kind != "service" for target in targets):
            report["others_cpu"] = max(report["others_cpu"] or 0.0, others.share)


def _check_memory(target: Target, alive: Sequence[Worker]) -> None:
    """Raise `UnavailableError` where another worker would most likely end them all."""
    free = machine.memory()
    held = max((worker.opened["loaded_mb"] for worker in alive), default=0.0) * 1e6
    if free and free < held + SPARE:
        raise UnavailableError(
            f"{free / 1e6:,.0f} MB of memory are free, and a target held {held / 1e6:,.0f} MB. "
            f"Time fewer at once; {target.name} is the first too many."
        )


def _size(worker: Worker) -> Sequence[int] | None:
    """(height, width) of a target's input; None where it is not known."""
    found = worker.opened["details"].get("size")
    return found and tuple(found)


def _row(worker: Worker, series: Series, first: Series | None) -> Row:
    target, opened = worker.target, worker.opened
    details, service = opened["details"], worker.target.kind == "service"
    seconds, images = series.seconds, target.batch * len(series.seconds)
    joules = [sample.joules for sample in series.samples if sample.joules is not None]
    backend = details.get("backend", target.backend)
    return Row(
        kind=target.kind,
        source=target.source,
        backend=backend if target.backend in ("auto", "http") else target.backend,
        choice=details.get("choice", ""),
        network=details.get("network", ""),
        native=target.native,
        operators=details.get("operators", ""),
        device=opened["device"],
        precision=details.get("precision", target.precision),
        batch=target.batch,
        concurrency=series.concurrency,
        size=details.get("size"),
        whole=target.options.whole or service,
        threads=target.options.threads,
        runs=len(seconds),
        ms=_quantiles(seconds),
        images_per_second=round(images / sum(sample.wall for sample in series.samples), 3),
        steady=series.steady,
        windows_ms=[round(median * 1e3, 4) for median in series.windows],
        over_first=ratio(series.medians, first.medians) if first else None,
        import_seconds=round(opened["import_seconds"], 3),
        load_seconds=round(opened["load_seconds"], 3),
        first_ms=round(opened["first_seconds"] * 1e3, 2),
        # A service's worker is only its client.
        loaded_mb=None if service else round(opened["loaded_mb"]),
        peak_mb=None if service else round(worker.peak_mb),
        device_mb=None if worker.device_mb is None else round(worker.device_mb),
        joules_per_image=round(sum(joules) / images, 4) if joules else None,
        manner=details.get("manner", ""),
        phases_ms=_phases([one for sample in series.samples for one in sample.phases]),
        gpu=_gpu_state([one for sample in series.samples for one in sample.readings]),
        engine=details.get("engine"),
    )


def _phases(runs: Sequence[Phases]) -> dict[str, float] | None:
    """Median milliseconds of each phase."""
    if not runs:
        return None
    names = [field.name for field in fields(Phases)]
    return {n: round(float(np.median([getattr(run, n) for run in runs])) * 1e3, 4) for n in names}


def _gpu_state(readings: Sequence[machine.Reading]) -> GpuState | None:
    if not readings:
        return None
    found: dict[str, dict[str, float] | None] = {}
    for name in ("sm_mhz", "memory_mhz", "watts", "celsius"):
        values = [value for one in readings if (value := getattr(one, name)) is not None]
        low, middle, high = np.percentile(values, [0, 50, 100]) if values else (0, 0, 0)
        ends = {"min": float(low), "median": float(middle), "max": float(high)}
        found[name] = ends if values else None
    reasons = Counter(why for one in readings for why in one.throttled)
    throttled = {why: round(count / len(readings), 3) for why, count in reasons.items()}
    return GpuState(readings=len(readings), throttled=throttled, **found)  # type: ignore[typeddict-item]


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 50, "p90": 90, "p99": 99, "q1": 25, "q3": 75, "min": 0}
    found = dict(zip(shares, np.percentile(seconds, list(shares.values())), strict=True))
    found["mean"] = np.mean(seconds)
    return {name: round(float(value) * 1e3, 4) for name, value in found.items()}


def add_profiles(report: Report, targets: Sequence[Target], progress: Progress = _silent) -> None:
    """Add ``profiles`` to a report: each source's time by layer, at its first batch size.

    On the CPU, by ONNX Runtime's own profile or a clock around PyTorch's layers; what has not
    run there is skipped, and the report says so.
    """
    ran = {(row["source"], row["backend"]) for row in report["rows"] if row["device"] == "cpu"}
    report["profiles"] = []
    for target in _first_of_each(targets):
        progress(f"profiling {target.name}", 1.0)
        if target.kind == "bundle" and (target.source, "onnxruntime-cpu") in ran:
            report["profiles"].append(_profile_bundle(target))
        elif target.kind == "checkpoint" and (target.source, "eager") in ran:
            report["profiles"].append(_profile_checkpoint(target))
        else:
            why = "Only ONNX Runtime's CPU provider and eager PyTorch on a CPU are profiled."
            report["skipped"].append(Skipped(f"layers of {target.source}", why)._asdict())


def _first_of_each(targets: Sequence[Target]) -> Iterator[Target]:
    """The first target of each source and kind of operators; services have no layers."""
    with_layers = [target for target in targets if target.kind != "service"]
    found = {(target.source, target.native): target for target in reversed(with_layers)}
    yield from reversed(found.values())


def _profile_bundle(target: Target) -> Profile:
    from fdconv_deploy.profiling.onnx_profile import by_layer, profile

    bundle = opened_bundle(target)
    library, _ = native_library(target.native)
    threads = target.options.threads
    with tempfile.TemporaryDirectory(prefix="fdconv-profile-") as folder:
        costs = profile(
            bundle.copy_to(Path(folder)).model_path(target.batch),
            bundle_inputs(bundle, target),
            Path(folder),
            threads=threads,
            runs=PROFILED_RUNS,
            library=library,
        )
    how = (
        f"Medians of {PROFILED_RUNS} runs by ONNX Runtime's own profile, CPU provider, {threads} "
        "threads; profiling adds a few percent."
    )
    backend = "onnxruntime-cpu, native" if library else "onnxruntime-cpu"
    return _profile(target, backend, how, by_layer(costs))


def _profile_checkpoint(target: Target) -> Profile:
    from fdconv_deploy.profiling.torch_profile import profile_network

    layers = profile_network(*load_network(target), runs=PROFILED_RUNS)
    how = (
        f"Medians of {PROFILED_RUNS} runs by a clock around each layer in eager PyTorch, "
        f"{target.options.threads} threads. What runs between two convolutions is the rest of "
        "the first."
    )
    return _profile(target, "eager", how, layers)


def _profile(target: Target, backend: str, how: str, layers: Sequence[LayerTimes]) -> Profile:
    from fdconv_deploy.profiling.onnx_profile import PARTS

    times = [
        LayerTime(name=one.name, ms={k: round(v, 4) for k, v in one.milliseconds.items()})
        for one in layers
    ]
    return Profile(
        title=f"{Path(target.source).name}, {backend}, batch {target.batch}",
        source=target.source,
        how=how,
        parts=list(PARTS),
        sums={part: round(sum(one["ms"].get(part, 0.0) for one in times), 3) for part in PARTS},
        layers=times,
    )


def add_divergences(
    report: Report, targets: Sequence[Target], progress: Progress = _silent
) -> None:
    """Add ``divergences``: how far each bundle is from the first one, layer by layer.

    Raises:
        FDConvError: there are no two bundles.
    """
    bundles = check_divergences(targets)
    report["divergences"] = []
    first = opened_bundle(bundles[0])
    for target in bundles[1:]:
        progress(f"comparing {target.name} with the first, layer by layer", 1.0)
        try:
            report["divergences"].append(_between(first, target))
        except FDConvError as error:
            skipped = Skipped(f"divergence of {target.source}", str(error))
            report["skipped"].append(skipped._asdict())


def check_divergences(targets: Sequence[Target]) -> list[Target]:
    """One target of each bundle.

    Raises:
        FDConvError: there are no two.
    """
    found = {one.source: one for one in _first_of_each(targets) if one.kind == "bundle"}
    if len(found) < 2:
        raise FDConvError("Divergence is that of a second bundle from the first: give two bundles.")
    return list(found.values())


def _between(first: Bundle, target: Target) -> Divergences:
    from fdconv_deploy.profiling.divergence import compare_bundles

    second = opened_bundle(target)
    batches = [batch for batch in first.batch_sizes if batch in second.batch_sizes]
    if not batches:
        raise FDConvError(
            f"It has graphs of batch {', '.join(map(str, second.batch_sizes))}, the first bundle "
            f"of {', '.join(map(str, first.batch_sizes))}: none in common."
        )
    inputs = bundle_inputs(first, target, batches[0])
    precisions = f"{second.manifest.precision} and {first.manifest.precision}"
    return Divergences(
        title=f"{second.path.name} and {first.path.name} ({precisions})",
        how=(
            "Outputs of both on the same pictures in ONNX Runtime's CPU provider: the largest "
            "difference as a share of the largest value, and the angle between them."
        ),
        layers=[
            LayerDivergence(
                name=one.name,
                max_rel=float(f"{one.max_rel:.3e}"),
                angle=float(f"{max(1 - one.cosine, 0):.2e}"),
            )
            for one in compare_bundles(first, second, batches[0], inputs)
        ],
    )
