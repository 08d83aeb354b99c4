"""One side in a process of its own: it opens the side, then runs when it is told to.

``python -m fdconv_deploy.latency.workers SIDE`` answers each line of JSON on its standard
input with one on its standard output. Between them it waits in a read, and takes no CPU time.
Its memory is the side's alone.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def main() -> None:
    """Serve one parent until it closes the pipe."""
    # Whatever libraries print goes to the log, not between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from fdconv_deploy.environment import missing
    from fdconv_deploy.errors import BackendError, FDConvError
    from fdconv_deploy.latency.nvml import gpus
    from fdconv_deploy.latency.open_target import open_work
    from fdconv_deploy.latency.targets import Side, UnavailableError

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")

    side = Side.from_json(sys.argv[1])
    try:
        imports(side)
        imported = time.perf_counter() - STARTED
        gpu = next(iter(gpus()), None)
        before = gpu.memory_mb() if gpu else None
        empty = memory_mb("VmRSS")
        start = time.perf_counter()
        work = open_work(side)
        loaded = time.perf_counter() - start
        loaded_mb = memory_mb("VmRSS")
        start = time.perf_counter()
        work.run()
        first = time.perf_counter() - start
        gpu = gpu if work.device == "cuda" else None
        answer(
            import_seconds=imported, load_seconds=loaded, first_seconds=first,
            cpu=time.process_time(), peak_mb=memory_mb("VmHWM"),
            empty_mb=empty, loaded_mb=loaded_mb, device=work.device, details=work.details,
        )  # fmt: skip
        gc.collect()
        gc.freeze()
        for line in sys.stdin:
            request = json.loads(line)
            spent = gpu.joules() if gpu else None
            seconds, wall = turn(work.run, request["runs"], request["concurrency"])
            after, used = (gpu.joules(), gpu.memory_mb()) if gpu else (None, None)
            answer(
                seconds=seconds, wall=wall, cpu=time.process_time(), peak_mb=memory_mb("VmHWM"),
                joules=None if spent is None or after is None else after - spent,
                device_mb=None if used is None or before is None else used - before,
            )  # fmt: skip
            gc.collect()
        work.close()
    except (FDConvError, OSError, ImportError, RuntimeError, MemoryError) as error:
        package = missing(error) if isinstance(error, ImportError) else None
        known = isinstance(error, FDConvError) or package is not None
        unavailable = isinstance(error, UnavailableError | BackendError | ImportError)
        if package is not None:
            said = f"{side.name} needs {package}"
        else:
            said = str(error) if known else f"{side.name} failed. {_said(error)}"
        answer(error=said, unavailable=unavailable)
        if not known:
            raise


def imports(side: Any) -> None:
    """What a side needs is imported before anything of it is timed."""
    needed = {
        "checkpoint": ["fdconv_deploy.latency.torch_targets"],
        "bundle": ["fdconv_deploy.runtime", "onnxruntime"],
        "service": ["fdconv_deploy.client"],
        "call": [side.source.partition(":")[0]],
    }
    for name in needed[side.kind]:
        # What is missing is said when it is used, in a sentence of its own.
        with contextlib.suppress(ImportError):
            import_module(name)


def turn(run: Callable[[], Any], runs: int, concurrency: int) -> tuple[list[float], float]:
    """Seconds of each of ``runs`` runs in each of ``concurrency`` threads, and of them all."""
    gc.disable()
    try:
        if concurrency == 1:
            start = time.perf_counter()
            seconds = timed(run, runs)
            return seconds, time.perf_counter() - start
        return _together(run, runs, concurrency)
    finally:
        gc.enable()


def timed(run: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of each of some runs, one after the other."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def _together(run: Callable[[], Any], runs: int, concurrency: int) -> tuple[list[float], float]:
    found: list[list[float]] = [[] for _ in range(concurrency)]
    failures: list[BaseException] = []
    ready = threading.Barrier(concurrency + 1)

    def loop(place: int) -> None:
        ready.wait()
        try:
            found[place] = timed(run, runs)
        except BaseException as error:  # raised where the turn was asked for
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(place,)) for place in range(concurrency)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    if failures:
        raise failures[0]
    return [second for one in found for second in one], wall


def memory_mb(key: str) -> float:
    """A line of ``/proc/self/status`` in MB: VmRSS is held now, VmHWM the most there was.

    Not ``getrusage``, whose maximum a process inherits from the one that started it. 0 where
    the system has no such file.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key)), 0.0)


def _said(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


if __name__ == "__main__":
    main()
