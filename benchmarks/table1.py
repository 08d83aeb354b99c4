"""The FDConv paper's Table 1 with the columns it lacks: ``python -m benchmarks.table1``.

Every method in the same ResNet-50: parameters and operations beside the paper's numbers, then
milliseconds per image in eager PyTorch and in ONNX Runtime, all networks taking turns in one
process so that a machine's drift hits all alike. Rivals and the plain network are exported by
``torch.onnx.export`` as they are, FDConv by this project. Batch 1, random weights. What is
counted and why numbers differ from the paper's: docs/table1.md.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks.cases import NETWORKS, LastFeature, parse_size
from benchmarks.networks import backbone, trained_like, upernet
from benchmarks.records import write_json
from export import export_module
from export.inputs import made_up_images
from fdconv_deploy.benchmark import machine
from fdconv_deploy.benchmark.counting import count_operations
from fdconv_deploy.benchmark.rivals import METHODS, install
from fdconv_deploy.benchmark.timing import interleave, ratio, spread
from fdconv_deploy.nn import ResNet, build_segmentor
from fdconv_deploy.runtime.backends.cores import available_cores

PLAIN, FDCONV = "plain", "fdconv"
# The size of the paper's FLOPs column: mmdetection's usual 1280×800.
COUNTED_AT = (800, 1280)


@dataclass(frozen=True)
class Frame:
    """What the methods are put into.

    ``network``: "backbone" gives its last feature map, "upernet" is a segmentor around it; a
    method changes the backbone alone. ``channels``: the first stage's, 64 as published.
    ``kernel_num``: FDConv's.
    """

    network: str = "backbone"
    channels: int = 64
    kernel_num: int = 64


@dataclass(frozen=True)
class Published:
    """What the paper's Table 1 says a method adds: millions of parameters, billions of FLOPs."""

    title: str
    parameters: float | None
    flops: float | None


def rows(methods: Iterable[str] = METHODS) -> dict[str, Published]:
    """The table's rows, in its order: plain, the rivals asked for, FDConv."""
    rivals = {key: METHODS[key] for key in METHODS if key in set(methods)}
    return {
        PLAIN: Published("ResNet-50, plain", None, None),
        **{key: Published(m.title, m.parameters, m.flops) for key, m in rivals.items()},
        FDCONV: Published("FDConv", 3.6, 1.8),
    }


def make(row: str, frame: Frame) -> nn.Module:
    """A row's network with fresh weights, in eval mode."""
    kernels = frame.kernel_num if row == FDCONV else None
    if frame.network == "upernet":
        segmentor = build_segmentor(upernet(50, kernels, width=frame.channels))
        made, changed = segmentor, segmentor.backbone
    else:
        changed = ResNet(backbone(50, kernels, frame.channels))
        made = LastFeature(changed)
    if row in METHODS:
        install(changed, row)
    return made.eval()


def count(names: Iterable[str], frame: Frame) -> dict[str, Any]:
    """Parameters and operations by row: totals of the plain network, of others what they add."""
    counts: dict[str, Any] = {}
    base = None
    for name in [PLAIN, *(n for n in names if n != PLAIN)]:
        with torch.device("meta"):
            made = make(name, frame)
        parameters = sum(p.numel() for p in made.parameters())
        operations = count_operations(made, (1, 3, *COUNTED_AT))
        if base is None:
            base = parameters, operations
        else:
            parameters, operations = parameters - base[0], operations - base[1]
        adds = operations.multiply_adds
        counts[name] = {"parameters": parameters, "multiply_adds": adds, **asdict(operations)}
    return counts


def export(row: str, network: nn.Module, x: Tensor, folder: Path) -> Path:
    """Export a network into ``folder``: the ONNX file."""
    if row == FDCONV:
        # Parity has tests of its own; here a random network's rounding must not stop the clock.
        return export_module(network, x, folder, tolerance=1e-2).model_path(1)
    folder.mkdir()
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    assert program is not None
    file = folder / "model.onnx"
    program.save(file, external_data=True)
    return file


def measure(
    names: Sequence[str],
    frame: Frame,
    size: tuple[int, int],
    folder: Path,
    *,
    threads: int,
    rounds: int,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time every row, eager and exported: JSON."""
    torch.set_num_threads(threads)
    x = made_up_images(1, size, seed=1)
    sides: dict[str, Callable[[], np.ndarray]] = {}
    megabytes = {}
    for name in names:
        progress(f"making and exporting {name}")
        torch.manual_seed(0)
        made = trained_like(make(name, frame))
        file = export(name, made, x, folder / name)
        megabytes[name] = sum(f.stat().st_size for f in file.parent.rglob("*")) / 1e6
        sides[f"eager/{name}"] = _eager(made, x)
        sides[f"exported/{name}"] = _exported(file, x, threads)
        gc.collect()
    # Outside inference mode PyTorch would keep every layer's input for a backward pass.
    with torch.inference_mode():
        errors = {name: _error(sides, name) for name in names}
        with machine.Bystanders() as others:
            times = interleave(sides, rounds=rounds, seconds=seconds, progress=progress)
    return {
        "size": list(size),
        "ms": {side: spread(values) for side, values in times.items()},
        "over_plain": {
            side: ratio(values, times[f"{side.partition('/')[0]}/{PLAIN}"])
            for side, values in times.items()
            if not side.endswith(f"/{PLAIN}")
        },
        "onnx_mb": {name: round(size, 1) for name, size in megabytes.items()},
        "max_rel_error": errors,
        "others_cpu": others.share,
    }


def _eager(network: nn.Module, x: Tensor) -> Callable[[], np.ndarray]:
    return lambda: network(x).numpy()


def _exported(file: Path, x: Tensor, threads: int) -> Callable[[], np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Between runs threads must sleep, or one side's would take the next side's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feeds)[0]


def _error(sides: dict[str, Callable[[], np.ndarray]], name: str) -> float:
    expected, answer = sides[f"eager/{name}"](), sides[f"exported/{name}"]()
    return float(np.abs(answer - expected).max() / np.abs(expected).max())


def markdown(result: dict[str, Any]) -> str:
    """The table, for people."""
    published = rows()
    if result["frame"]["channels"] != 64:  # then the paper's numbers are of other networks
        published = {key: Published(row.title, None, None) for key, row in published.items()}
    counts, timed = result["counts"], result.get("latency")
    height, width = COUNTED_AT
    heads = [
        "", "parameters", "paper", f"multiply-adds, G at {height}×{width}", "paper",
        "element-wise, G", "Fourier transforms, GFLOP",
    ]  # fmt: skip
    if timed:
        where = "×".join(map(str, timed["size"]))
        heads += [f"PyTorch, ms at {where}", "", "ONNX Runtime, ms", "", "images/s", "ONNX, MB"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, counted in counts.items():
        sign = "" if name == PLAIN else "+"
        paper = published[name]
        cells = [
            paper.title,
            f"{sign}{counted['parameters']:,}",
            f"+{paper.parameters} M" if paper.parameters else "",
            f"{sign}{counted['multiply_adds'] / 1e9:.3f}",
            f"+{paper.flops} G" if paper.flops else "–" if paper.parameters else "",
            f"{sign}{counted['elementwise'] / 1e9:.3f}",
            f"{sign}{counted['transform'] / 1e9:.2f}" if counted["transform"] else "",
        ]
        if timed:
            for side in ("eager", "exported"):
                over = timed["over_plain"].get(f"{side}/{name}")
                cells += [
                    f"{timed['ms'][f'{side}/{name}']['median']:.1f}",
                    f"{over['value']:.2f}×" if over else "1",
                ]
            cells += [
                f"{1e3 / timed['ms'][f'exported/{name}']['median']:.2f}",
                f"{timed['onnx_mb'][name]:.0f}",
            ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--network", choices=NETWORKS, default="backbone")
    made.add_argument("--size", type=parse_size, default=(512, 512), help="timed, HEIGHTxWIDTH")
    made.add_argument("--counts", action="store_true", help="count only, time nothing")
    made.add_argument("--quick", action="store_true", help="5 rounds")
    made.add_argument("--rounds", type=int, default=15, help="runs of each side, at most")
    made.add_argument("--seconds", type=float, default=600.0, help="of timing, at most")
    made.add_argument("--threads", type=int, default=available_cores())
    made.add_argument("--channels", type=int, default=64, help="the first stage's; narrower")
    made.add_argument("--kernel-num", type=int, default=64, help="FDConv's")
    made.add_argument("--json", type=Path, help="write the result here too")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    # The exporter's chatter would bury the progress.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    names = list(rows(options.methods))
    frame = Frame(options.network, options.channels, options.kernel_num)
    result: dict[str, Any] = {"frame": asdict(frame), "counts": count(names, frame)}
    where = machine.describe(options.threads)
    if not options.counts:
        machine.warn_if_busy()
        with tempfile.TemporaryDirectory(prefix="fdconv-table1-") as folder:
            result["latency"] = measure(
                names,
                frame,
                options.size,
                Path(folder),
                threads=options.threads,
                rounds=5 if options.quick else options.rounds,
                seconds=options.seconds,
                progress=lambda step: print(f"  {step}", file=sys.stderr, flush=True),
            )
    print(markdown(result))
    if not options.counts:
        share = result["latency"]["others_cpu"] or 0
        if share > machine.QUIET:
            print(f"\nOthers had {share:.0%} of the CPUs meanwhile: measure again before quoting.")
        print(f"\n{machine.say(where)}")
    if options.json:
        write_json(options.json, {"kind": "table1", "machine": where, **result})


if __name__ == "__main__":
    main()
