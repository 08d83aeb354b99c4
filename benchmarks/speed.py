"""What FDConv costs, side by side in one process: ``python -m benchmarks.speed``.

Eager PyTorch as published, the folded network in PyTorch, the exported bundle in ONNX Runtime
as it is and, where they are built, with the native operators, and the baseline in both; the same
in OpenVINO, in float32 and bfloat16, where it is installed. One run of each in turn, so that a
machine's drift hits all alike. Medians with quartiles; quote the ratios. The exports are made, and
measured, in fresh processes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case, add_case_arguments, named_case
from benchmarks.export_size import measure as measure_export
from benchmarks.options import keep, script
from benchmarks.timing import interleave, spread
from fdconv_deploy.errors import BackendError
from fdconv_deploy.folding.network import fold_network
from fdconv_deploy.latency import machine, ratio
from fdconv_deploy.ops.native import NCHW, Native, native_library
from fdconv_deploy.runtime import Session, open_session

# Sides in OpenVINO: what they run, in which backend, with native operators or without.
OPENVINO = {
    "openvino_plain": ("plain", "openvino", False),
    "openvino": ("fdconv", "openvino", False),
    "openvino_native": ("fdconv", "openvino", True),
    "openvino_bf16_plain": ("plain", "openvino-bf16", False),
    "openvino_bf16": ("fdconv", "openvino-bf16", False),
    "openvino_bf16_native": ("fdconv", "openvino-bf16", True),
}
SIDES = {
    "eager": "FDConv, PyTorch as published",
    "folded": "FDConv, folded, PyTorch",
    "exported": "FDConv, exported, ONNX Runtime",
    "native": "FDConv, exported, native operators",
    "native_nchw": "the same, features not in blocks",
    "plain_eager": "baseline, PyTorch",
    "plain": "baseline, ONNX Runtime",
    "openvino_plain": "baseline, OpenVINO",
    "openvino": "FDConv, exported, OpenVINO",
    "openvino_native": "FDConv, native operators, OpenVINO",
    "openvino_bf16_plain": "baseline, OpenVINO bfloat16",
    "openvino_bf16": "FDConv, exported, OpenVINO bfloat16",
    "openvino_bf16_native": "FDConv, native op., OpenVINO bf16",
}
RATIOS = (
    ("exported", "eager"),
    ("exported", "plain"),
    ("native", "eager"),
    ("native", "plain"),
    ("native_nchw", "plain"),
    ("folded", "eager"),
    ("eager", "plain_eager"),
    ("openvino", "native"),
    ("openvino_native", "native"),
    ("openvino_bf16", "native"),
    ("openvino_bf16_native", "native"),
    ("openvino_bf16_native", "native_nchw"),
)


def measure(
    case: Case,
    folder: Path,
    *,
    threads: int,
    rounds: int = 15,
    seconds: float = 120.0,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Export both networks into ``folder``, then time all sides.

    :returns: JSON: milliseconds by side, ratios, what the exports took, the exported graph's
        error on the timed images, and how much of the machine others had.
    """
    torch.set_num_threads(threads)
    progress("making the networks")
    x = case.images()
    dynamic, plain = case.make(), case.make(dynamic=False)
    progress("exporting")
    export = measure_export(case, dynamic, folder / "fdconv")
    plain_export = measure_export(case, plain, folder / "plain", dynamic=False)
    # Outside inference mode PyTorch would keep every layer's input for a backward pass.
    with torch.inference_mode(), ExitStack() as stack:

        def opened(name: str, native: Native, backend: str = "onnxruntime-cpu") -> Session:
            session = open_session(folder / name, backend, threads=threads, native=native)
            return stack.enter_context(session)

        fdconv_session, plain_session = opened("fdconv", False), opened("plain", False)
        folded = fold_network(dynamic, x)
        sides: dict[str, Callable[[], Any]] = {
            "eager": lambda: dynamic(x),
            "folded": lambda: folded(x),
            "exported": _run(fdconv_session, x.numpy()),
            "plain_eager": lambda: plain(x),
            "plain": _run(plain_session, x.numpy()),
        }
        if native_library()[0] is not None:
            sides["native"] = _run(opened("fdconv", True), x.numpy())
            sides["native_nchw"] = _run(opened("fdconv", NCHW), x.numpy())
        for side, (name, backend, native) in OPENVINO.items():
            try:  # not installed, not built, or no bfloat16 here
                sides[side] = _run(opened(name, native, backend), x.numpy())
            except BackendError as error:  # noqa: PERF203
                progress(f"without {side}: {error}")
        expected = sides["eager"]().numpy()
        errors = {
            side: float(np.abs(sides[side]() - expected).max() / np.abs(expected).max())
            for side in ("exported", "native", "native_nchw", *OPENVINO)
            if side in sides and OPENVINO.get(side, ("fdconv",))[0] == "fdconv"
        }
        processor: dict[str, list[float]] = {side: [] for side in sides}
        with machine.Bystanders() as others:
            counted = {side: _counted(run, processor[side]) for side, run in sides.items()}
            times = interleave(counted, rounds=rounds, seconds=seconds, progress=progress)
    return {
        "title": case.title,
        "case": case.as_dict(),
        "commit": machine.commit(),
        "ms": {side: spread(values) for side, values in times.items()},
        "cpu_ms": {side: spread(processor[side][-len(times[side]) :]) for side in times},
        "ratios": {
            f"{a}/{b}": ratio(times[a], times[b]) for a, b in RATIOS if {a, b} <= set(times)
        },
        "max_rel_error": max(error for side, error in errors.items() if side not in OPENVINO),
        "errors": errors,
        "others_cpu": others.share,
        "export": export,
        "plain_export": plain_export,
    }


def _counted(run: Callable[[], Any], seconds: list[float]) -> Callable[[], Any]:
    """A call that notes the processor time of all its threads, too."""

    def counted() -> Any:
        start = time.process_time()
        answer = run()
        seconds.append(time.process_time() - start)
        return answer

    return counted


def _run(session: Session, x: np.ndarray) -> Callable[[], np.ndarray]:
    """A call that runs a bundle the way a service does."""
    (specs,) = session.bundle.manifest.inputs.values()
    (name,) = (spec.name for spec in specs)
    return lambda: next(iter(session.run_raw({name: x}).values()))


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    print(result["title"])
    for side, name in SIDES.items():
        if side not in result["ms"]:
            print(f"  {name:34} not here (fdconv doctor; python -m fdconv_deploy.ops.native)")
            continue
        ms, cpu = result["ms"][side], result["cpu_ms"][side]
        print(
            f"  {name:34} {ms['median']:9.1f} ms  [{ms['q1']:.1f} to {ms['q3']:.1f}], "
            f"fastest {ms['min']:.1f}, {ms['runs']} runs, processor {cpu['median']:.1f}"
        )
        if side in result["errors"]:
            print(f"  {'':34} largest error {result['errors'][side]:.1e} of the largest value")
    for name, value in result["ratios"].items():
        print(f"  {name:34} {value['value']:9.3f}     [{value['q1']:.3f} to {value['q3']:.3f}]")
    export = result["export"]
    print(
        f"  export {export['export_seconds']} s, {export['peak_mb']} MB peak, {export['nodes']} "
        f"nodes, {export['bundle_mb']} MB bundle; error {result['max_rel_error']:.1e}"
    )
    if shared := machine.shared_machine(result["others_cpu"]):
        print(f"  {shared}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to measure, the same for one case and for many."""
    parser.add_argument("--rounds", type=int, default=15, help="runs of each side, at most")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="timing per case; 5 rounds are run anyway"
    )


def main() -> None:
    parser = script(__doc__)
    add_case_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--of-many", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.of_many:  # then the load is the case's before
        machine.warn_if_busy()
    case = named_case(options)
    where = machine.describe(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            case,
            Path(folder),
            threads=options.threads,
            rounds=options.rounds,
            seconds=options.seconds,
            progress=lambda step: print(f"  {case.key}: {step}", file=sys.stderr, flush=True),
        )
    show(result)
    keep(options, "speed", where, result)


if __name__ == "__main__":
    main()
