"""Mutate the files that the readers take, and see that each is read or refused with a sentence.

    python -m benchmarks.fuzz_readers --json result.json
    python -m benchmarks.fuzz_readers --only checkpoint-zip --first 117 --runs 1 --keep folder

A reader is a row of `READERS`, out of the modules of `benchmarks.fuzz`: where its seeds come from,
how one of them is damaged, the call that a damaged one is given to, and how many runs it makes.
Anything but an answer or an error of this project counts as a failure, and so does a run longer
than ``--seconds`` or a process larger than ``--megabytes``. Runs are made by child processes, many
each, so that one that hangs or dies ends no more than itself. Run N of a reader is the same
whenever it is made.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.fuzz import bundles, checkpoints, datasets
from benchmarks.options import keep, script
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency import machine

ROOT = Path(__file__).parents[1]
BATCH = 2000  # runs of one child process

READERS = {**checkpoints.READERS, **datasets.READERS, **bundles.READERS}


# One run, in a child process


def mutated(name: str, number: int) -> tuple[str, bytes]:
    """The file of a reader's run: its name and content."""
    reader = READERS[name]
    rng = random.Random(f"{name}/{number}")
    seeds = _seeds(name)
    file = rng.choice(sorted(seeds))
    return file, reader.mutate(rng, seeds[file], list(seeds.values()))


@cache
def _seeds(name: str) -> dict[str, bytes]:
    return READERS[name].seeds()


def child(name: str, numbers: range, megabytes: int) -> None:
    """Make runs, saying before each that it begins and after each how it ended, as JSON lines."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    _seeds(name)
    say = _only_voice()
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + (megabytes << 20), -1))
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            say({"begins": number})
            say(run_once(name, number, Path(folder)))


def _only_voice() -> Callable[[dict[str, Any]], None]:
    """What writes a line to standard output, where libraries' own messages no longer go."""
    lines = os.fdopen(os.dup(1), "w")
    sys.stderr = os.fdopen(os.dup(2), "w")  # a fault of this script's is still seen
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    return lambda said: print(json.dumps(said), file=lines, flush=True)


def run_once(name: str, number: int, folder: Path) -> dict[str, Any]:
    """Make one run: how it ended (read, refused or failed), what was said, how long it took."""
    file, content = mutated(name, number)
    path = folder / file
    path.write_bytes(content)
    start = time.perf_counter()
    how, detail = "read", ""
    try:
        READERS[name].read(path)
    except FDConvError as error:
        how, detail = "refused", str(error).replace(str(folder), "")
        try:
            detail.encode()
        except UnicodeEncodeError:
            how = "failed"  # a message that cannot be printed is none
    except BaseException:  # whatever it is, it is what is looked for here
        how, detail = "failed", traceback.format_exc()
    finally:
        path.unlink()
    return {
        "number": number,
        "how": how,
        "detail": detail,
        "seconds": time.perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


# All runs


def child_command(name: str, batch: list[int], options: argparse.Namespace) -> list[str]:
    """What starts the child process of one batch of runs."""
    return [
        *(sys.executable, "-m", "benchmarks.fuzz_readers", "--child", "--only", name),
        *("--first", str(batch[0]), "--runs", str(len(batch))),
        *("--megabytes", str(options.megabytes)),
    ]


def runs_of(name: str, numbers: range, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How each run ended. One that hangs or kills its process is ended and reported."""
    left = list(numbers)
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        command = child_command(name, batch, options)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        current: int | None = None
        try:
            for line in said(process, options.seconds):
                if line is None:
                    break
                end = json.loads(line)
                current = end.get("begins")
                if "how" in end:
                    yield end
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if current is not None:
            how = "hung" if process.returncode == -9 else f"ended with {process.returncode}"
            yield {"number": current, "how": "failed", "detail": f"its process {how}"}
            left = [number for number in batch if number > current] + left
        elif process.returncode != 0:
            raise SystemExit(f"The child process of {name} stopped between runs.")


def said(process: subprocess.Popen[bytes], seconds: float) -> Iterator[bytes | None]:
    """What a process says; None if it says nothing for so long. It may take longer to start."""
    patience = 300.0
    assert process.stdout is not None
    rest = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], patience)
        if not ready:
            yield None
            return
        more = process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
        if not more:
            process.wait()
            return
        *lines, rest = (rest + more).split(b"\n")
        yield from lines
        patience = seconds


def summary(name: str, ends: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, the slowest run and the largest process of one reader."""
    count = {how: sum(end["how"] == how for end in ends) for how in ("read", "refused", "failed")}
    seconds = [end["seconds"] for end in ends if "seconds" in end]
    return {
        "reader": name,
        "runs": len(ends),
        **count,
        "slowest_seconds": round(max(seconds, default=0), 2),
        "peak_mb": round(max((end.get("peak_mb", 0) for end in ends), default=0)),
        "failures": [
            {"number": end["number"], "detail": end["detail"]}
            for end in ends
            if end["how"] == "failed"
        ],
    }


def main() -> None:
    parser = script(__doc__, threads=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, help="of all readers together; by default all shares")
    parser.add_argument("--only", choices=READERS, action="append", help="this reader; repeatable")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seconds", type=float, default=60, help="longest run that is no hang")
    parser.add_argument("--megabytes", type=int, default=2048, help="largest process")
    parser.add_argument("--keep", type=Path, help="write the mutated files here, and run nothing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.only or list(READERS)
    total = sum(READERS[name].runs for name in names)
    numbers = {}
    for name in names:
        share = READERS[name].runs * (options.runs or total)
        numbers[name] = range(options.first, options.first + -(-share // total))
    if options.child:
        child(names[0], numbers[names[0]], options.megabytes)
        return
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        for name in names:
            for number in numbers[name]:
                file, content = mutated(name, number)
                (options.keep / f"{name}_{number}_{file}").write_bytes(content)
        return
    results = []
    for name in names:
        found = summary(name, list(runs_of(name, numbers[name], options)))
        print(
            f"{name}: {found['runs']} runs, {found['read']} read, {found['refused']} refused, "
            f"{found['failed']} failed; slowest {found['slowest_seconds']} s, "
            f"peak {found['peak_mb']} MB",
            flush=True,
        )
        for failure in found["failures"]:
            print(f"  run {failure['number']}: {failure['detail']}")
        results.append(found)
    keep(options, "fuzz-readers", machine.describe(1), {"readers": results})
    bad = [r for r in results if r["failed"] or r["peak_mb"] > options.megabytes]
    if bad:
        raise SystemExit(f"Failures in {', '.join(r['reader'] for r in bad)}.")


if __name__ == "__main__":
    main()
