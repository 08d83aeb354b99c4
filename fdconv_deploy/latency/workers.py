"""A process for each target: nothing of another target is in its memory or in its way.

`Worker` starts ``python -m fdconv_deploy.latency.workers TARGET SECONDS``, which opens the target
and then answers each line of JSON on its standard input with one on its standard output. Between
them it waits in a read, and takes no CPU time.
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
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from typing import Any, TypedDict
from uuid import UUID

from fdconv_deploy.environment import missing
from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.interleaving import Sample
from fdconv_deploy.latency.targets import Details, Target, UnavailableError, open_target
from fdconv_deploy.runtime.backends.base import Phases

# What is imported before opening a target of each kind is timed.
_IMPORTS = {
    "checkpoint": ("torch", "fdconv_deploy.checkpoints", "fdconv_deploy.nn.detection"),
    "bundle": ("fdconv_deploy.runtime", "onnxruntime"),
    "service": ("fdconv_deploy.client",),
}


# Runs of a turn whose phases are told apart.
PHASES = 10


class Opened(TypedDict):
    """What a worker says once its target is open and was run once.

    ``import_seconds``: from starting the process until its libraries were imported. Memory of
    the process: ``empty_mb`` before loading, ``loaded_mb`` after it, ``peak_mb`` at the most.
    ``gpu``: UUID of the GPU that does the work; None where there is none or it is not known.
    """

    import_seconds: float
    load_seconds: float
    first_seconds: float
    cpu: float
    empty_mb: float
    loaded_mb: float
    peak_mb: float
    device: str
    gpu: str | None
    details: Details


class Worker(contextlib.AbstractContextManager["Worker"]):
    """A target in a process of its own, opened and run once. A context manager.

    Attributes:
        opened: what opening took.
        cpu_seconds: CPU time of the process so far.
        peak_mb: the most memory that the process held so far.
        device_mb: GPU memory taken since the process started; None where it is not known.

    Raises:
        UnavailableError: the target's backend cannot be had on this machine.
        FDConvError: the target cannot be opened or run.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.cpu_seconds = self.peak_mb = 0.0
        self.device_mb: float | None = None
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
            self.opened: Opened = self._read()
            uuid = self.opened["gpu"]
            self._gpu = machine.visible_gpu(uuid) if uuid else None
        except BaseException:
            self.close()
            raise

    def sample(self, runs: int, concurrency: int) -> Sample:
        """Run ``runs`` times in each of ``concurrency`` threads.

        Raises:
            FDConvError: a run failed.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of is read below
            request = json.dumps({"runs": runs, "concurrency": concurrency})
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        with machine.ClockWatch(self._gpu) as watch:
            found = self._read()
        if found["device_mb"] is not None:
            self.device_mb = max(self.device_mb or 0.0, found["device_mb"])
        phases = tuple(Phases(**one) for one in found["phases"])
        seconds, readings = tuple(found["seconds"]), tuple(watch.readings)
        return Sample(seconds, found["wall"], found["joules"], phases, readings)

    def close(self) -> None:
        """End the process; one that runs is not waited for."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FDConvError(f"{self.target.name} {self._end()}")
        found = json.loads(line)
        if "error" in found:
            raise (UnavailableError if found["unavailable"] else FDConvError)(found["error"])
        self.cpu_seconds, self.peak_mb = found["cpu"], found["peak_mb"]
        return found

    def _end(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "was killed, most likely for want of memory. Free some, or time fewer targets."
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"ended with {code}: {lines[-1] if lines else 'it gave no reason'}"

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Serve one parent until it closes the pipe."""
    # Whatever libraries print goes to the log, not between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    target, started = Target.model_validate_json(sys.argv[1]), float(sys.argv[2])

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")

    try:
        _serve(target, started, answer)
    except (FDConvError, OSError, ImportError, RuntimeError, MemoryError) as error:
        package = missing(error) if isinstance(error, ImportError) else None
        unavailable = isinstance(error, UnavailableError | BackendError | ImportError)
        if package is not None:
            answer(error=f"{target.name} needs {package}", unavailable=True)
        elif isinstance(error, FDConvError):
            answer(error=str(error), unavailable=unavailable)
        else:
            first = (str(error).strip().splitlines() or [""])[0]
            text = f"{target.name} failed. {type(error).__name__}: {first}"
            answer(error=text.rstrip(": "), unavailable=unavailable)
            raise


def _serve(target: Target, started: float, answer: Callable[..., None]) -> None:
    for name in _IMPORTS.get(target.kind, (target.source.partition(":")[0],)):
        # A missing package is reported where it is used.
        with contextlib.suppress(ImportError):
            import_module(name)
    imported = time.time() - started
    gpu = machine.visible_gpu()
    before = gpu.memory_mb() if gpu else None
    empty = memory_mb("VmRSS")
    start = time.perf_counter()
    work = open_target(target)
    loaded = time.perf_counter() - start
    loaded_mb = memory_mb("VmRSS")
    start = time.perf_counter()
    work.run()
    first = time.perf_counter() - start
    if work.device == "cuda":
        uuid = _cuda_uuid() or (gpu.uuid if gpu else None)
        gpu = machine.visible_gpu(uuid)
    else:
        gpu = uuid = None
    answer(
        import_seconds=imported, load_seconds=loaded, first_seconds=first,
        cpu=time.process_time(), peak_mb=memory_mb("VmHWM"),
        empty_mb=empty, loaded_mb=loaded_mb, device=work.device, gpu=uuid,
        details=work.details,
    )  # fmt: skip
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        spent = gpu.joules() if gpu else None
        seconds, wall = timed_runs(work.run, request["runs"], request["concurrency"])
        after, used = (gpu.joules(), gpu.memory_mb()) if gpu else (None, None)
        # After what is timed, since they wait between the phases of a run.
        count = min(request["runs"], PHASES) if work.phases is not None else 0
        phases = [asdict(work.phases()) for _ in range(count)] if work.phases else []
        answer(
            seconds=seconds, wall=wall, cpu=time.process_time(), peak_mb=memory_mb("VmHWM"),
            phases=phases, joules=None if spent is None or after is None else after - spent,
            device_mb=None if used is None or before is None else used - before,
        )  # fmt: skip
        gc.collect()
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

    The garbage collector is off meanwhile.

    Raises:
        BaseException: what a run raised, in whichever thread.
    """
    found: list[list[float]] = [[] for _ in range(concurrency)]
    failures: list[BaseException] = []
    ready = threading.Barrier(concurrency)

    def loop(place: int) -> None:
        ready.wait()
        try:
            for _ in range(runs):
                start = clock()
                run()
                found[place].append(clock() - start)
        except BaseException as error:  # raised below, in the thread that asked
            failures.append(error)

    # This thread is one of them: with a concurrency of 1 no thread is started.
    threads = [threading.Thread(target=loop, args=(place,)) for place in range(1, concurrency)]
    gc.disable()
    try:
        for thread in threads:
            thread.start()
        start = clock()
        loop(0)
        for thread in threads:
            thread.join()
        wall = clock() - start
    finally:
        gc.enable()
    if failures:
        raise failures[0]
    return [second for one in found for second in one], wall


def memory_mb(key: str) -> float:
    """A line of ``/proc/self/status`` in MB: VmRSS is held now, VmHWM the most there was.

    Not ``getrusage``, whose maximum a process inherits from the one that started it. 0 where
    the system has no such file.
    """
    return machine.proc_bytes("/proc/self/status", key) / 1e6


if __name__ == "__main__":
    main()
