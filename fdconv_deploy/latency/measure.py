"""From targets to a report: workers are started, take turns until each is steady, and are told of.

Targets of one batch size are alive together; batch sizes follow one another.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fdconv_deploy.errors import FDConvError, UsageError
from fdconv_deploy.latency import Clock, Interleaver, machine, ratio
from fdconv_deploy.latency.networks import (
    Opened,
    Skipped,
    Target,
    UnavailableError,
    bundle_inputs,
    load_network,
    opened_bundle,
)
from fdconv_deploy.latency.report import Divergences, GpuState, Profile, Report, Row, Span
from fdconv_deploy.latency.workers import Sample, Worker
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.profiling import WARM_UP
from fdconv_deploy.runtime.bundle import Bundle

# So many windows must agree.
AGREEING = 3
# What stays free when another worker is started.
SPARE = 300e6
# Runs of a profile that count.
PROFILED_RUNS = 10
# Told what is going on.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Schedule:
    """How long targets take turns."""

    seconds: float = 60.0  # no round starts after this long
    warm_up: float = 0.5  # seconds of each target that do not count, two runs at the least
    turn: float = 0.2  # seconds that one target runs for in a round; one run if that takes longer
    window: int = 5  # rounds in a window
    agree: float = 0.03  # the share of the middle one that medians of three windows lie within


@dataclass
class Series:
    """A target at one concurrency, and its samples: one for each round."""

    sample: Callable[[int, int], Sample]  # runs it so often in so many threads: `Worker.sample`
    concurrency: int = 1
    runs: int = 1  # in a sample, and thread
    samples: list[Sample] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)  # median seconds of each window
    steady: bool = False  # whether the last three windows agree

    @property
    def seconds(self) -> list[float]:
        """Of every run that counts."""
        return [second for sample in self.samples for second in sample.seconds]

    @property
    def medians(self) -> list[float]:
        """Median seconds of each round."""
        return [float(np.median(sample.seconds)) for sample in self.samples]

    def warm_up(self, schedule: Schedule, clock: Clock) -> None:
        """Run until caches are full and clocks are up; settle how many runs make a sample."""
        start, done, last = clock(), 0, 0.0
        while done < 2 or clock() - start < schedule.warm_up:
            last = float(np.median(self.sample(1, self.concurrency).seconds))
            done += 1
        self.runs = max(1, round(schedule.turn / max(last, 1e-6)))

    def take(self) -> None:
        """Take a sample."""
        self.samples.append(self.sample(self.runs, self.concurrency))

    def end_window(self, schedule: Schedule) -> None:
        """Note the window's median, and whether the last three agree."""
        window = self.samples[len(self.windows) * schedule.window :]
        self.windows.append(float(np.median([s for sample in window for s in sample.seconds])))
        self.steady = agree(self.windows, schedule.agree)


def agree(medians: Sequence[float], share: float) -> bool:
    """Whether the last three of some medians lie within ``share`` of the middle one."""
    last = sorted(medians[-AGREEING:])
    return len(last) == AGREEING and last[-1] - last[0] <= share * last[1]


def sample_until_steady(
    series: Sequence[Series],
    schedule: Schedule,
    progress: Callable[[int, int, float], None] = lambda *_: None,
    clock: Clock = time.perf_counter,
) -> None:
    """Warm series up, and sample them in turn until each is steady, or time is up.

    Series that are steady go on while others are not: all have the same rounds. ``progress`` is
    told after each how many there were, how many series are steady, and the seconds so far.
    """
    for one in series:
        one.warm_up(schedule, clock)
    turns = Interleaver([one.take for one in series], clock)
    start, rounds, elapsed = clock(), 0, 0.0
    while not all(one.steady for one in series) and (not rounds or elapsed <= schedule.seconds):
        for number in range(schedule.window):
            turns.round()
            rounds, elapsed = rounds + 1, clock() - start
            progress(rounds, sum(one.steady for one in series), elapsed)
            # A window is cut short only where the next round would be of no use.
            if number >= 1 and elapsed > schedule.seconds:
                break
        for one in series:
            one.end_window(schedule)


def measure(
    targets: Sequence[Target],
    schedule: Schedule,
    *,
    concurrency: Sequence[int] = (1,),
    skipped: Sequence[Skipped] = (),
    progress: Progress = lambda _: None,
) -> Report:
    """Time every target at each concurrency (requests at a time).

    What cannot be opened joins those ``skipped`` in the report.

    Raises:
        FDConvError: a target that was asked for by name cannot be had, or none can.
    """
    report = Report(
        machine=machine.describe(targets[0].options.threads),
        settings={**asdict(schedule), "concurrency": list(concurrency)},
        skipped=list(skipped),
    )
    for batch in sorted({target.batch for target in targets}):
        group = [target for target in targets if target.batch == batch]
        _measure_group(group, schedule, concurrency, report, progress)
    if not report.rows:
        first = report.skipped[0]
        raise FDConvError(f"Nothing could be timed. {first.what}: {first.why}")
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
            progress(f"opening {target.name}")
            try:
                _check_memory(target, workers)
                workers.append(stack.enter_context(Worker(target)))
            except FDConvError as error:
                if target.named:
                    raise
                report.skipped.append(Skipped(target.name, str(error)))
        if not workers:
            return
        series = [
            (worker, Series(worker.sample, each)) for worker in workers for each in concurrency
        ]
        batch = f"batch {targets[0].batch}"

        def on_round(rounds: int, steady: int, seconds: float) -> None:
            steadily = f"{rounds} rounds, {steady} of {len(series)} steady"
            progress(f"{batch}: {steadily}, {seconds:.0f} of at most {schedule.seconds:g} s")

        progress(f"{batch}: warming up")
        with machine.Bystanders(lambda: sum(one.opened.cpu_seconds for one in workers)) as others:
            sample_until_steady([one for _, one in series], schedule, on_round)
        for worker, one in series:
            base, first = next(s for s in series if s[1].concurrency == one.concurrency)
            # An image of another size is another amount of work.
            alike = first is not one and base.opened.size == worker.opened.size
            report.rows.append(_row(worker.opened, one, first if alike else None))
        # A service's own work cannot be separated from that of others.
        if others.share is not None and all(target.kind != "service" for target in targets):
            report.others_cpu = max(report.others_cpu or 0.0, others.share)


def _check_memory(target: Target, alive: Sequence[Worker]) -> None:
    """Raise `UnavailableError` where another worker would most likely end them all."""
    free = machine.memory()
    held = max((worker.opened.loaded_mb or 0 for worker in alive), default=0) * 1e6
    if free and free < held + SPARE:
        raise UnavailableError(
            f"{free / 1e6:,.0f} MB of memory are free, and a target held {held / 1e6:,.0f} MB. "
            f"Time fewer at once; {target.name} is the first too many."
        )


def _row(opened: Opened, series: Series, first: Series | None) -> Row:
    samples, seconds = series.samples, series.seconds
    images = opened.batch * len(seconds)
    joules = [sample.joules for sample in samples if sample.joules is not None]
    phases = [asdict(phases) for sample in samples for phases in sample.phases]
    names = phases[0] if phases else ()
    medians = {name: np.median([one[name] for one in phases]) for name in names}
    return Row(
        **opened.model_dump(),
        concurrency=series.concurrency,
        runs=len(seconds),
        ms=_quantiles(seconds),
        images_per_second=round(images / sum(sample.wall for sample in samples), 3),
        steady=series.steady,
        windows_ms=[round(median * 1e3, 4) for median in series.windows],
        over_first=ratio(series.medians, first.medians) if first else None,
        joules_per_image=round(sum(joules) / images, 4) if joules else None,
        phases_ms=_ms(medians) or None,
        gpu=_gpu_state([reading for sample in samples for reading in sample.readings]),
    )


def _ms(seconds: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(float(value) * 1e3, 4) for name, value in seconds.items()}


def _gpu_state(readings: Sequence[machine.Reading]) -> GpuState | None:
    if not readings:
        return None
    spans: dict[str, Span] = {}
    for name in ("sm_mhz", "memory_mhz", "watts", "celsius"):
        values = [value for one in readings if (value := getattr(one, name)) is not None]
        if values:
            spans[name] = Span(min=min(values), median=float(np.median(values)), max=max(values))
    reasons = Counter(why for one in readings for why in one.throttled)
    throttled = {why: round(count / len(readings), 3) for why, count in reasons.items()}
    return GpuState(readings=len(readings), throttled=throttled, **spans)


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 50, "p90": 90, "p99": 99, "q1": 25, "q3": 75, "min": 0}
    found = zip(shares, np.percentile(seconds, list(shares.values())), strict=True)
    return _ms({**dict(found), "mean": np.mean(seconds)})


def add_profiles(report: Report, targets: Sequence[Target], progress: Progress) -> None:
    """Add each source's time by layer, at its first batch size, to a report.

    What has not run on the CPU in ONNX Runtime or eager PyTorch is skipped, and the report says so.
    """
    ran = {(row.source, row.backend) for row in report.rows if row.device == "cpu"}
    profiled = {"bundle": "onnxruntime-cpu", "checkpoint": "eager"}
    for target in _first_of_each(targets):
        progress(f"profiling {target.name}")
        if (target.source, profiled.get(target.kind)) in ran:
            report.profiles.append(_profile(target))
        else:
            why = "Only ONNX Runtime's CPU provider and eager PyTorch on a CPU are profiled."
            report.skipped.append(Skipped(f"layers of {target.source}", why))


def _profile(target: Target) -> Profile:
    from fdconv_deploy.profiling.profile import ProfiledGraph, ProfiledNetwork

    threads = target.options.threads
    profiled: Any
    inputs: Any
    with tempfile.TemporaryDirectory(prefix="fdconv-profile-") as name:
        if target.kind == "bundle":
            bundle, folder = opened_bundle(target), Path(name)
            library, _ = native_library(target.native)
            model = bundle.copy_to(folder).model_path(target.batch)
            profiled = ProfiledGraph(model, folder, threads=threads, library=library)
            inputs = bundle_inputs(bundle, target)
            backend = "onnxruntime-cpu, native" if library else "onnxruntime-cpu"
            how = "ONNX Runtime's own profile, CPU provider; profiling adds a few percent."
        else:
            network, inputs = load_network(target)
            profiled, backend = ProfiledNetwork(network), "eager"
            how = (
                "a clock around each layer in eager PyTorch. What runs between two convolutions "
                "is the rest of the first."
            )
        for _ in range(WARM_UP + PROFILED_RUNS):
            profiled.run(inputs)
        return Profile(
            title=f"{Path(target.source).name}, {backend}, batch {target.batch}",
            source=target.source,
            how=f"Medians of {PROFILED_RUNS} runs on {threads} threads by {how}",
            layers=profiled.layers(),
        )


def _first_of_each(targets: Sequence[Target]) -> Iterable[Target]:
    """The first target of each source and kind of operators; services have no layers."""
    found: dict[Any, Target] = {}
    for target in targets:
        if target.kind != "service":
            found.setdefault((target.source, target.native), target)
    return found.values()


def compared_bundles(targets: Sequence[Target]) -> list[Target]:
    """One target of each bundle, whose divergence from the first is told.

    Raises:
        UsageError: there are no two.
    """
    found = {one.source: one for one in _first_of_each(targets) if one.kind == "bundle"}
    if len(found) < 2:
        raise UsageError("Divergence is that of a second bundle from the first: give two bundles.")
    return list(found.values())


def add_divergences(report: Report, bundles: Sequence[Target], progress: Progress) -> None:
    """Add how far each of some bundles is from the first one, layer by layer."""
    for target in bundles[1:]:
        progress(f"comparing {target.name} with the first, layer by layer")
        try:
            report.divergences.append(_between(opened_bundle(bundles[0]), target))
        except FDConvError as error:
            report.skipped.append(Skipped(f"divergence of {target.source}", str(error)))


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
        layers=compare_bundles(first, second, batches[0], inputs),
    )
