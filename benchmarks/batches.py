"""What a batch of four costs beside one image: ``python -m benchmarks.batches``.

Both graphs of one bundle take turns in one process, with native operators and without, and so do
the plain twin's. Cases of `benchmarks.matrix` have a process each, minutes apart, and a shared
machine's speed drifts by more than the difference; ratios here are of one run.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case, add_case_arguments, named_case
from benchmarks.export_size import TOLERANCE
from benchmarks.records import write_json
from export import export_module
from fdconv_deploy.benchmark import machine
from fdconv_deploy.benchmark.timing import interleave, ratio, spread
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.backends.cores import available_cores

BATCHES = (1, 4)


def measure(case: Case, folder: Path, *, threads: int, rounds: int, seconds: float) -> dict:
    """JSON: milliseconds by side and batch, and the ratio of batch 4 to batch 1 by side."""
    x = case.images()
    sides = {"portable": (True, False), "plain": (False, False)}
    if native_library()[0] is not None:
        sides["native"] = (True, True)
    for dynamic in (True, False):
        export_module(
            case.make(dynamic=dynamic), x, folder / str(dynamic), batches=BATCHES,
            tolerance=TOLERANCE,
        )  # fmt: skip
    runs: dict[str, Any] = {}
    with ExitStack() as stack:
        for side, (dynamic, native) in sides.items():
            session = stack.enter_context(
                open_session(
                    folder / str(dynamic), "onnxruntime-cpu", threads=threads, native=native
                )
            )
            for batch in BATCHES:
                feeds = {"input": np.repeat(x.numpy()[:1], batch, axis=0)}
                runs[f"{side}, batch {batch}"] = lambda s=session, f=feeds: s.run_raw(f)
        with machine.Bystanders() as others:
            times = interleave(runs, rounds=rounds, seconds=seconds)
    one, four = (f"batch {batch}" for batch in BATCHES)
    return {
        "title": case.title,
        "case": case.as_dict(),
        "ms": {name: spread(values) for name, values in times.items()},
        "batch 4 / batch 1": {
            side: ratio(times[f"{side}, {four}"], times[f"{side}, {one}"]) for side in sides
        },
        "others_cpu": others.share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_arguments(parser)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    case, where = named_case(options), machine.describe(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            case, Path(folder), threads=options.threads, rounds=options.rounds,
            seconds=options.seconds,
        )  # fmt: skip
    print(result["title"])
    for name, ms in result["ms"].items():
        print(f"  {name:20} {ms['median']:8.1f} ms  [{ms['q1']:.1f} to {ms['q3']:.1f}]")
    for side, found in result["batch 4 / batch 1"].items():
        print(f"  {side}: {found['value']:.2f} times  [{found['q1']:.2f} to {found['q3']:.2f}]")
    print(machine.say(where))
    if options.json:
        write_json(options.json, {"kind": "batches", "machine": where, **result})


if __name__ == "__main__":
    main()
