"""What four images cost beside one: ``python -m benchmarks.batches``.

As the graph of batch 4 (``run_raw``), and as ``run_batches`` divides them after warm-up. The runs
of one bundle take turns in one process, with native operators and without, and so do the
baseline's. Cases of `benchmarks.matrix` have a process each, minutes apart, and a shared machine's
speed drifts by more than the difference; ratios here are of one run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, add_case_arguments, named_case
from benchmarks.export_size import TOLERANCE
from benchmarks.options import keep, script
from benchmarks.timing import interleave, spread
from fdconv_deploy.export import export_module
from fdconv_deploy.latency import machine, ratio
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime import open_session

MANY = 4
# (FDConv rather than its baseline, native operators)
SIDES = {"native": (True, True), "portable": (True, False), "plain": (False, False)}


def measure(
    case: Case,
    folder: Path,
    *,
    threads: int,
    rounds: int,
    seconds: float,
    sides: Sequence[str] = tuple(SIDES),
) -> dict[str, Any]:
    """JSON: by side, milliseconds of one image and of four, and the ratios of four to one."""
    x = case.images()
    four = replace(case, batch=MANY).images().numpy()
    for dynamic in {SIDES[side][0] for side in sides}:
        export_module(
            case.make(dynamic=dynamic), x, folder / str(dynamic), batches=(1, MANY),
            tolerance=TOLERANCE,
        )  # fmt: skip
    found = {}
    with machine.Bystanders() as others:
        for side in sides:
            dynamic, native = SIDES[side]
            with open_session(
                folder / str(dynamic), "onnxruntime-cpu", threads=threads, native=native
            ) as session:
                warm_up = session.warm_up()
                times = interleave(
                    {
                        "one": lambda: session.run_raw({"input": four[:1]}),
                        "graph": lambda: session.run_raw({"input": four}),
                        "divided": lambda: session.run_batches({"input": four}),
                    },
                    rounds=rounds,
                    seconds=seconds,
                )
                found[side] = {
                    "ms": {name: spread(values) for name, values in times.items()},
                    "of one": {name: ratio(times[name], times["one"]) for name in times},
                    "ways": {str(batch): way for batch, way in session.runner.ways.items()},
                    "warm_up_seconds": round(warm_up, 1),
                }
    return {
        "title": case.title,
        "case": case.as_dict(),
        "sides": found,
        "others_cpu": others.share,
    }


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    print(f"{result['title']}; four images as one graph's run, and as run_batches divides them")
    for side, found in result["sides"].items():
        for name, ms in found["ms"].items():
            of = found["of one"][name]
            said = f"{ms['median']:8.1f} ms  [{ms['q1']:.1f} to {ms['q3']:.1f}]"
            if name != "one":
                said += f"  {of['value']:.2f} times one  [{of['q1']:.2f} to {of['q3']:.2f}]"
            print(f"  {side:9} {name:8} {said}")
        print(f"  {side:9} batch {MANY} by {found['ways'][str(MANY)]}")
    if result["others_cpu"] is not None:
        print(f"Other processes used {result['others_cpu']:.1%} of the CPUs.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script(__doc__)
    add_case_arguments(parser)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=None)
    options = parser.parse_args(arguments)
    case, where = named_case(options), machine.describe(options.threads)
    built = native_library()[0] is not None
    sides = options.sides or [side for side in SIDES if built or side != "native"]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            case, Path(folder), threads=options.threads, rounds=options.rounds,
            seconds=options.seconds, sides=sides,
        )  # fmt: skip
    show(result)
    keep(options, "batches", where, result)


if __name__ == "__main__":
    main()
