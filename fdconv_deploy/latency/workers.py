"""A process for each target: nothing of another target is in its memory or in its way.

`Worker` starts ``python -m fdconv_deploy.latency.workers TARGET SECONDS``, which opens the target
and answers with a line of JSON, and then each line of its standard input (runs, concurrency) with
another. Between them it waits in a read, and takes no CPU time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, TypeVar
from uuid import UUID

from pydantic import BaseModel

from fdconv_deploy.environment import missing
from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.networks import Opened, Target, UnavailableError, open_target
from fdconv_deploy.runtime.backends.base import Phases

# What is imported before opening a target of each kind is timed.
_IMPORTS = {
    "checkpoint": ("torch", "fdconv_deploy.checkpoints", "fdconv_deploy.nn.detection"),
    "bundle": ("fdconv_deploy.runtime", "onnxruntime"),
    "service": ("fdconv_deploy.client",),
}
# Runs of a turn whose phases are told apart.
PHASES = 10


class Sample(BaseModel):
    """One turn of a target."""

    seconds: list[float]  # of each run
    wall: float  # seconds of all runs together
    joules: float | None = None  # of all runs, where they are known
    phases: list[Phases] = []  # on a GPU, of runs after those
    readings: list[machine.Reading] = []  # of the GPU meanwhile
    # Of the process so far, as in `Opened`.
    peak_mb: int | None = None
    device_mb: int | None = None
    cpu_seconds: float = 0.0


_Answer = TypeVar("_Answer", Opened, Sample)


class Worker(contextlib.AbstractContextManager["Worker"]):
    """A target in a process of its own, opened and run once. A context manager.

    ``opened`` is what that took, and what the process took so far.

    Raises:
        UnavailableError: the target's backend cannot be had on this machine.
        FDConvError: the target cannot be opened or run.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        # Closed in `close`: it lives as long as the process.
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        path = os.pathsep.join([str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = str(target.options.threads)
        command = [sys.executable, "-m", __name__, target.model_dump_json(), repr(time.time())]
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and package
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads},
        )
        try:
            self.opened = self._read(Opened)
            uuid = self.opened.gpu_uuid
            self._gpu = machine.visible_gpu(uuid) if uuid else None
        except BaseException:
            self.close()
            raise

    def sample(self, runs: int, concurrency: int) -> Sample:
        """Run ``runs`` times in each of ``concurrency`` threads; ``FDConvError`` if one failed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of is read below
            self._process.stdin.write(f"{runs} {concurrency}\n")
            self._process.stdin.flush()
        with machine.watched(self._gpu) as readings:
            found = self._read(Sample)
        so_far = found.model_dump(include={"cpu_seconds", "peak_mb", "device_mb"})
        if self.opened.device_mb is not None and found.device_mb is not None:
            so_far["device_mb"] = max(self.opened.device_mb, found.device_mb)
        self.opened = self.opened.model_copy(update=so_far)
        return found.model_copy(update={"readings": readings})

    def close(self) -> None:
        """End the process; one that runs is not waited for."""
        with self._log, self._process as process:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, kind: type[_Answer]) -> _Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FDConvError(f"{self.target.name} {self._end()}")
        found = json.loads(line)
        if "error" in found:
            raise (UnavailableError if found["unavailable"] else FDConvError)(found["error"])
        return kind.model_validate(found)

    def _end(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "was killed, most likely for want of memory. Free some, or time fewer targets."
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"ended with {code}: {lines[-1] if lines else 'it gave no reason'}"


def main() -> None:
    """Serve one parent until it closes the pipe."""
    # Whatever libraries print goes to the log, not between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    target, started = Target.model_validate_json(sys.argv[1]), float(sys.argv[2])
    try:
        for answer in _answers(target, started):
            answers.write(answer.model_dump_json() + "\n")
            gc.collect()
    except (FDConvError, OSError, ImportError, RuntimeError, MemoryError) as error:
        package = missing(error) if isinstance(error, ImportError) else None
        text = str(error) if package is None else f"{target.name} needs {package}"
        foreseen = package is not None or isinstance(error, FDConvError)
        if not foreseen:
            first = (str(error).strip().splitlines() or [""])[0]
            text = f"{target.name} failed. {type(error).__name__}: {first}".rstrip(": ")
        unavailable = isinstance(error, UnavailableError | BackendError | ImportError)
        answers.write(json.dumps({"error": text, "unavailable": unavailable}) + "\n")
        if not foreseen:
            raise


def _answers(target: Target, started: float) -> Iterator[BaseModel]:
    """What opening took, and then a sample for each line of standard input."""
    for name in _IMPORTS.get(target.kind, (target.source.partition(":")[0],)):
        # A missing package is reported where it is used.
        with contextlib.suppress(ImportError):
            import_module(name)
    imported = time.time() - started

    def held_mb(key: str) -> int | None:
        """Memory held now (VmRSS) or at the most (VmHWM).

        Not by ``getrusage``, whose maximum a process inherits from the one that started it.
        """
        if target.kind == "service":
            return None
        return round(machine.memory(key, "/proc/self/status") / 1e6)

    gpu = machine.visible_gpu()
    before = gpu.memory_mb() if gpu else None
    start = time.perf_counter()
    work = open_target(target)
    loaded = time.perf_counter() - start
    loaded_mb = held_mb("VmRSS")
    start = time.perf_counter()
    work.run()
    first = time.perf_counter() - start
    uuid = None
    if work.opened.device == "cuda":
        uuid = _cuda_uuid() or (gpu.uuid if gpu else None)
    gpu = machine.visible_gpu(uuid) if uuid else None

    def usage() -> dict[str, Any]:
        used = gpu.memory_mb() if gpu else None
        taken = None if used is None or before is None else round(used - before)
        spent = time.process_time()
        return {"cpu_seconds": spent, "peak_mb": held_mb("VmHWM"), "device_mb": taken}

    took = dict(
        import_seconds=round(imported, 3),
        load_seconds=round(loaded, 3),
        first_ms=round(first * 1e3, 2),
        loaded_mb=loaded_mb,
        gpu_uuid=uuid,
    )
    yield work.opened.model_copy(update={**took, **usage()})
    gc.freeze()
    for line in sys.stdin:
        runs, concurrency = map(int, line.split())
        spent = gpu.joules() if gpu else None
        seconds, wall = timed_runs(work.run, runs, concurrency)
        after = gpu.joules() if gpu else None
        yield Sample(
            **usage(),
            seconds=seconds,
            wall=wall,
            joules=None if spent is None or after is None else after - spent,
            # After what is timed, since they wait between the phases of a run.
            phases=[work.phases() for _ in range(min(runs, PHASES))] if work.phases else [],
        )
    work.close()


def _cuda_uuid() -> str | None:
    """UUID of CUDA's first device, by whichever of its libraries is loaded; None by none."""
    torch, runtime = sys.modules.get("torch"), sys.modules.get("cuda.bindings.runtime")
    with contextlib.suppress(Exception):  # whatever a driver that is not there makes them raise
        if torch is not None and torch.cuda.is_available():
            return f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        if runtime is not None:
            _, properties = runtime.cudaGetDeviceProperties(0)
            return f"GPU-{UUID(bytes=bytes(properties.uuid.bytes))}"
    return None


def timed_runs(
    run: Callable[[], Any],
    runs: int,
    concurrency: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], float]:
    """Seconds of each of ``runs`` runs in each of ``concurrency`` threads, and of all together.

    This thread is one of them, and the garbage collector is off meanwhile. What a run raises, in
    whichever thread, is raised.
    """
    ready = threading.Barrier(concurrency)

    def loop() -> list[float]:
        ready.wait()
        found = []
        for _ in range(runs):
            start = clock()
            run()
            found.append(clock() - start)
        return found

    gc.disable()
    try:
        with ThreadPoolExecutor(concurrency) as pool:
            others = [pool.submit(loop) for _ in range(concurrency - 1)]
            start = clock()
            found = [loop(), *(other.result() for other in others)]
            wall = clock() - start
    finally:
        gc.enable()
    return [second for one in found for second in one], wall


if __name__ == "__main__":
    main()
