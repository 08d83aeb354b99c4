"""What a report can say beside its timings: time by layer, and divergence by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency.open_target import inputs_of
from fdconv_deploy.latency.targets import Side
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime.bundle import Bundle

RUNS = 10
Progress = Callable[[str, float], None]
Section = dict[str, Any]


def add_profiles(
    report: dict[str, Any], sides: Sequence[Side], progress: Progress = lambda *_: None
) -> None:
    """Add ``profiles`` to a report: each source's time by layer, at its first batch size.

    On the CPU, by ONNX Runtime's own profile or a clock around PyTorch's layers; what has not
    run there is left out, and the report says so.
    """
    ran = {(row["source"], row["backend"]) for row in report["rows"] if row["device"] == "cpu"}
    report["profiles"] = []
    for (source, _), side in _by_source(sides):
        progress(f"profiling {side.name}", 1.0)
        if side.kind == "bundle" and (source, "onnxruntime-cpu") in ran:
            report["profiles"].append(_of_bundle(side))
        elif side.kind == "checkpoint" and (source, "eager") in ran:
            report["profiles"].append(_of_checkpoint(side))
        else:
            why = "Only ONNX Runtime's CPU provider and eager PyTorch on a CPU are profiled."
            report["skipped"].append({"what": f"layers of {source}", "why": why})


def add_divergences(
    report: dict[str, Any], sides: Sequence[Side], progress: Progress = lambda *_: None
) -> None:
    """Add ``divergences``: how far each bundle is from the first one, layer by layer."""
    bundles = check_divergences(sides)
    report["divergences"] = []
    first = Bundle.open(bundles[0].source, verify=False)
    for side in bundles[1:]:
        progress(f"comparing {side.name} with the first, layer by layer", 1.0)
        try:
            report["divergences"].append(_between(first, side))
        except FDConvError as error:
            what = f"divergence of {side.source}"
            report["skipped"].append({"what": what, "why": str(error)})


def check_divergences(sides: Sequence[Side]) -> list[Side]:
    """One side of each bundle.

    :raises FDConvError: there are no two.
    """
    bundles = list(
        {s: side for (s, _), side in _by_source(sides) if side.kind == "bundle"}.values()
    )
    if len(bundles) < 2:
        raise FDConvError("Divergence is that of a second bundle from the first: give two bundles.")
    return bundles


def _by_source(sides: Sequence[Side]) -> Iterator[tuple[tuple[str, bool | None], Side]]:
    """The first side of each source and kind of operators; services have no layers."""
    first: dict[tuple[str, bool | None], Side] = {}
    for side in sides:
        if side.kind != "service":
            first.setdefault((side.source, side.native), side)
    yield from first.items()


def _of_bundle(side: Side) -> Section:
    from fdconv_deploy.profiling.onnx_profile import PARTS, by_layer, profile

    bundle = Bundle.open(side.source, verify=False)
    library, _ = native_library(side.native)
    with tempfile.TemporaryDirectory(prefix="fdconv-profile-") as folder:
        costs = profile(
            bundle.model_path(side.batch),
            inputs_of(bundle, side),
            Path(folder),
            threads=side.threads,
            runs=RUNS,
            library=library,
        )
    layers = [layer.as_dict() for layer in by_layer(costs)]
    how = (
        f"Medians of {RUNS} runs by ONNX Runtime's own profile, CPU provider, {side.threads} "
        "threads; profiling adds a few percent."
    )
    backend = "onnxruntime-cpu, native" if library else "onnxruntime-cpu"
    return _profile(side, backend, how, PARTS, layers)


def _of_checkpoint(side: Side) -> Section:
    from fdconv_deploy.latency.torch_targets import load
    from fdconv_deploy.profiling.onnx_profile import PARTS
    from fdconv_deploy.profiling.torch_profile import profile_network

    network, inputs = load(side)
    layers = [layer.as_dict() for layer in profile_network(network, inputs, runs=RUNS)]
    how = (
        f"Medians of {RUNS} runs by a clock around each layer in eager PyTorch, {side.threads} "
        "threads. What runs between two convolutions is the rest of the first."
    )
    return _profile(side, "eager", how, PARTS, layers)


def _profile(
    side: Side, backend: str, how: str, parts: Sequence[str], layers: list[Section]
) -> Section:
    sums = {part: round(sum(one["ms"].get(part, 0.0) for one in layers), 3) for part in parts}
    name = Path(side.source).name
    return {
        "title": f"{name}, {backend}, batch {side.batch}",
        "source": side.source,
        "how": how,
        "parts": list(parts),
        "sums": sums,
        "layers": layers,
    }


def _between(first: Bundle, side: Side) -> Section:
    from fdconv_deploy.profiling.bundle_divergence import compare_bundles

    second = Bundle.open(side.source, verify=False)
    batches = [batch for batch in first.batch_sizes if batch in second.batch_sizes]
    if not batches:
        raise FDConvError(
            f"It has graphs of batch {', '.join(map(str, second.batch_sizes))}, the first bundle "
            f"of {', '.join(map(str, first.batch_sizes))}: none in common."
        )
    feeds = inputs_of(first, side, batches[0])
    found = compare_bundles(first, second, batches[0], feeds)
    precisions = f"{second.manifest.precision} and {first.manifest.precision}"
    return {
        "title": f"{second.path.name} and {first.path.name} ({precisions})",
        "how": (
            "Outputs of both on the same pictures in ONNX Runtime's CPU provider: the largest "
            "difference as a share of the largest value, and the angle between them."
        ),
        "layers": [
            {"name": d.name, "max_rel": float(f"{d.max_rel:.3e}"),
             "angle": float(f"{max(1 - d.cosine, 0):.2e}")}
            for d in found
        ],
    }  # fmt: skip
