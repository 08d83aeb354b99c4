"""Everything FDConv costs, case by case: ``python -m benchmarks.matrix``.

Backbone and UPerNet, 18, 50 and 101 layers, 512×512 and 512×1024, batches 1 and 4, and one
sweep each over image size and kernel_num. Each case is ``benchmarks.speed`` in a process of its
own, so that none inherits another's memory. Results are written after every case: an
interrupted run loses one case at most, and ``--resume`` goes on. ``--quick`` does one case.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cases import (
    BATCHES,
    DEPTHS,
    NETWORKS,
    SIZES,
    SWEEPS,
    Case,
    add_width_arguments,
    grid,
    parse_size,
    sweep,
)
from benchmarks.records import FOLDER, write_json
from benchmarks.speed import add_arguments
from fdconv_deploy.latency import machine
from fdconv_deploy.runtime.backends.threads import available_cores

# What decides speed: measurements of different ones of these do not belong in one table.
DECISIVE = ("cpu", "cores", "threads", "versions")
Measure = Callable[[Case], dict[str, Any]]


class MatrixError(Exception):
    """What was asked for cannot be done; the message says why."""


def run(
    cases: Sequence[Case],
    measure: Measure,
    output: Path,
    where: dict[str, Any],
    *,
    resume: bool = False,
    available: Callable[[], float] = lambda: psutil.virtual_memory().available,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure each case and write what is known so far to ``output`` after each.

    A case that needs more memory than is ``available`` (bytes) is skipped, one that fails is
    noted; both with the reason, in the record.

    :param where: the machine, see ``machine.describe``.
    :param resume: keep the cases measured in ``output`` already.
    :raises MatrixError: ``output`` exists and is not to be resumed, or is of another machine.
    """
    record = _start(output, where, resume)
    known = record["cases"]
    todo = [case for case in cases if "ms" not in known.get(case.key, {})]
    for number, case in enumerate(todo, 1):
        before = f"[{number}/{len(todo)}] {case.key}: "
        started = time.perf_counter()
        free = available()
        if case.memory > free:
            reason = f"needs about {case.memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            result: dict[str, Any] = {"skipped": reason}
        else:
            try:
                result = measure(case)
            except MatrixError as error:
                result = {"failed": str(error)}
        known[case.key] = {"title": case.title, "case": case.as_dict(), **result}
        write_json(output, record)
        say(f"{before}{_summary(result)} ({time.perf_counter() - started:.0f} s)")
    return record


def _start(output: Path, where: dict[str, Any], resume: bool) -> dict[str, Any]:
    if not output.exists():
        return {"kind": "matrix", "machine": where, "cases": {}}
    if not resume:
        raise MatrixError(
            f"{output} exists. Say --resume to go on with it, or --output for another file."
        )
    record = json.loads(output.read_text(encoding="utf-8"))
    for key in DECISIVE:
        if record["machine"][key] != where[key]:
            raise MatrixError(
                f"{output} was measured with {key} {record['machine'][key]}, here it is "
                f"{where[key]}: those do not belong in one table. Give another --output."
            )
    return record


def _summary(result: dict[str, Any]) -> str:
    if "ms" not in result:
        return " ".join(f"{what}: {why}" for what, why in result.items())
    eager, plain = (result["ratios"][f"exported/{side}"]["value"] for side in ("eager", "plain"))
    noisy = ", NOISY" if (result["others_cpu"] or 0) > machine.QUIET else ""
    median = result["ms"]["exported"]["median"]
    said = f"exported {median} ms, {eager}× eager, {plain}× plain"
    if "native" in result["ms"]:
        eager, plain = (result["ratios"][f"native/{side}"]["value"] for side in ("eager", "plain"))
        median = result["ms"]["native"]["median"]
        said += f"; native {median} ms, {eager}× eager, {plain}× plain"
    return said + noisy


def in_fresh_process(case: Case, *, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """``benchmarks.speed`` on a case.

    :raises MatrixError: it ended without a result.
    """
    with tempfile.TemporaryDirectory(prefix="fdconv-matrix-") as folder:
        file = Path(folder) / "result.json"
        arguments = {
            "network": case.network,
            "depth": case.depth,
            "size": f"{case.height}x{case.width}",
            "batch": case.batch,
            "kernel-num": case.kernel_num,
            "channels": case.channels,
            "threads": threads,
            "rounds": rounds,
            "seconds": seconds,
            "json": file,
        }
        flags = [str(part) for key, value in arguments.items() for part in (f"--{key}", value)]
        command = [sys.executable, "-m", "benchmarks.speed", "--of-many", *flags]
        # stderr is left alone: the child's progress is seen as it comes.
        finished = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, cwd=machine.ROOT)
        if finished.returncode == -9:
            raise MatrixError("the process was killed, most likely for want of memory")
        if finished.returncode or not file.exists():
            raise MatrixError(f"the process ended with {finished.returncode}; see its output")
        result = json.loads(file.read_text(encoding="utf-8"))
    return {k: v for k, v in result.items() if k not in ("kind", "machine")}


def select(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for, each once."""
    shape = options.kernel_num, options.channels
    if options.quick:
        return grid(["backbone"], [50], [(512, 512)], [1], *shape)
    cases = []
    if not options.only_sweeps:
        cases = grid(options.networks, options.depths, options.sizes, options.batches, *shape)
    for name in options.sweeps:
        cases += sweep(name, options.channels)
    wanted = (case for case in cases if fnmatch.fnmatch(case.key, options.only))
    return list(dict.fromkeys(wanted))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    made.add_argument("--depths", nargs="+", type=int, choices=DEPTHS, default=list(DEPTHS))
    made.add_argument(
        "--sizes", nargs="+", type=parse_size, default=list(SIZES), help="HEIGHTxWIDTH"
    )
    made.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    made.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    made.add_argument("--only-sweeps", action="store_true", help="leave the grid out")
    made.add_argument("--only", default="*", help="keys that match, e.g. 'upernet-r50-*'")
    made.add_argument("--quick", action="store_true", help="the R50 backbone at 512x512 alone")
    made.add_argument("--threads", type=int, default=available_cores())
    add_width_arguments(made)
    made.add_argument("--list", action="store_true", help="say what would be measured")
    made.add_argument("--resume", action="store_true", help="keep what --output has")
    made.add_argument(
        "--output", type=Path, default=FOLDER / f"{date.today().isoformat()}-matrix.json"
    )
    add_arguments(made)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    cases = select(options)
    if options.list:
        for case in cases:
            print(f"{case.key:36} {case.memory / 1e9:5.1f} GB")
        return
    machine.warn_if_busy()
    settings = dict(threads=options.threads, rounds=options.rounds, seconds=options.seconds)
    try:
        run(
            cases,
            lambda case: in_fresh_process(case, **settings),
            options.output,
            machine.describe(options.threads),
            resume=options.resume,
            say=lambda line: print(line, flush=True),
        )
    except MatrixError as error:
        sys.exit(str(error))
    print(f"{options.output}: python -m benchmarks.report makes tables and the plot of it.")


if __name__ == "__main__":
    main()
