"""Inference in child processes: a crash in native code costs one worker, not the service.

Tensors cross in memory that both processes map; a pipe carries only what is to be done. Each
inference thread of the service drives one child. A child that ends, or exceeds the time for a
run, is replaced at once, and its request is answered with a 503 that may be retried.

A child is this module, run as ``python -m fdconv_deploy.serve.workers PIPE MEMORY BACKEND
THREADS``. It ends when the service's end of the pipe is closed.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.batching import WorkerDiedError
from fdconv_deploy.serve.settings import Settings

from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.runtime import Bundle, Session, open_session

log = logging.getLogger("fdconv.serve")
_START_SECONDS = 120.0
Array = npt.NDArray[Any]


class _Memory:
    """Memory of a file that both processes map."""

    def __init__(self, file: int) -> None:
        self.file, self.size = file, 0
        self._map: Any = b""

    def array(self, shape: Sequence[int], dtype: np.dtype[Any], size: int = 0) -> Array:
        """An array at its beginning; ``size`` is the file's, where the other side made it grow."""
        count = int(np.prod(shape))
        if (needed := max(size, count * dtype.itemsize)) > self.size:
            if not size:
                os.ftruncate(self.file, needed)
            self._map, self.size = mmap.mmap(self.file, needed), needed
        return np.frombuffer(self._map, dtype, count).reshape(shape)


class Child:
    """One worker process. Not for use from several threads at once; hold ``lock``."""

    def __init__(self, settings: Settings) -> None:
        self.lock = threading.Lock()
        self._settings = settings
        self._models: dict[str, tuple[str, str]] = {}  # key -> (path, manifest's identity)
        self._start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def load(self, key: str, path: str, manifest: str) -> None:
        """Open a bundle under ``key`` and run each of its graphs once."""
        self._ask("load", key, path, manifest, limit=_START_SECONDS)
        self._models[key] = path, manifest

    def unload(self, key: str) -> None:
        """Let go of a bundle."""
        if self._models.pop(key, None):
            self._ask("unload", key)

    def run(self, key: str, inputs: Array) -> Array:
        """As ``Session.run``, in the child."""
        if key not in self._models:
            raise WorkerDiedError("the worker was replaced and does not have this model yet")
        np.copyto(self._memory.array(inputs.shape, inputs.dtype), inputs)
        answer = self._ask("run", key, inputs.shape, inputs.dtype, self._memory.size)
        return self._memory.array(*answer).copy()

    def restart(self) -> None:
        """End the process, start another, and load what it had."""
        self.close()
        self._start()
        models, self._models = self._models, {}
        for key, model in models.items():
            with contextlib.suppress(BackendError):  # which its requests are told
                self.load(key, *model)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        os.close(self._memory.file)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._memory = _Memory(_shared_file())
        inherited = theirs.fileno(), self._memory.file
        command = [sys.executable, "-m", "fdconv_deploy.serve.workers", *map(str, inherited)]
        command += [self._settings.backend, str(self._settings.threads or 0)]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=inherited, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._receive(_START_SECONDS)

    def _ask(self, *message: Any, limit: float | None = None) -> Any:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._died("ended") from error
        return self._receive(limit or self._settings.run_timeout_seconds)

    def _receive(self, limit: float) -> Any:
        try:
            if not self._pipe.poll(limit):
                raise self._died(f"did not answer within {limit:g} s")
            problem, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died("ended") from error
        if problem is not None:
            raise BackendError(problem)
        return answer

    def _died(self, how: str) -> WorkerDiedError:
        log.error("the worker process %d %s", self.pid, how)
        return WorkerDiedError(f"the worker process {how}")


class Children:
    """The worker processes, one for each inference thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.all: list[Child] = []
        self._free: list[Child] = []
        self._mine = threading.local()

    def start(self) -> None:
        """Start the processes."""
        self.all = [Child(self._settings) for _ in range(self._settings.workers)]
        self._free = list(self.all)

    def run(self, key: str, inputs: Array) -> Array:
        """Run on the calling thread's child, which is replaced if it dies.

        Raises:
            WorkerDiedError: It did.
        """
        child: Child | None = getattr(self._mine, "child", None)
        if child is None:
            try:
                child = self._free.pop()
            except IndexError:  # an inference thread that died has left its child
                child = self.all[0]
            self._mine.child = child
        with child.lock:
            try:
                return child.run(key, inputs)
            except WorkerDiedError:
                child.restart()
                raise

    def each(self, call: Callable[[Child], None]) -> None:
        """Do something with every child in turn, between their runs."""
        for child in self.all:
            with child.lock:
                try:
                    call(child)
                except WorkerDiedError as error:
                    child.restart()
                    raise BackendError(f"A worker could not be prepared: {error}.") from error

    def close(self) -> None:
        """End them all."""
        for child in self.all:
            child.close()


class IsolatedSession(Session):
    """A session whose runs happen in the worker processes; here it only prepares and finishes."""

    def __init__(self, bundle: Bundle, settings: Settings, children: Children) -> None:
        here = open_session(bundle, "onnxruntime-cpu", threads=1)
        super().__init__(bundle, here._backend, "It runs in worker processes.", {})
        self._children = children
        self._key = f"{bundle.path}\0{id(self)}"
        self._manifest = bundle.manifest.model_dump_json()
        self._named = settings.backend

    @property
    def backend(self) -> str:
        """The backend asked for; each worker process chooses for itself when it is "auto"."""
        return f"{self._named} (worker processes)"

    @property
    def ways(self) -> dict[int, str]:
        """Nothing: each worker process measures and chooses for itself."""
        return {}

    def run(self, batch: Array) -> Array:
        """See :meth:`Session.run`."""
        return self._children.run(self._key, np.ascontiguousarray(batch))

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> float:
        """Load the bundle in every worker, or time one run of these batch sizes."""
        start = time.perf_counter()
        if batch_sizes is None:
            path = str(self.bundle.path)
            self._children.each(lambda child: child.load(self._key, path, self._manifest))
        else:
            first = self._children.all[0]
            with first.lock:
                for batch in batch_sizes:
                    first.run(self._key, self.blank(batch))
        return time.perf_counter() - start

    def close(self) -> None:
        """Let go of the bundle in every worker."""
        super().close()
        self._children.each(lambda child: child.unload(self._key))


def _shared_file() -> int:
    """A descriptor of memory that a child may map too."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fdconv-worker")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Worker:
    """The child's side: each method answers one kind of message."""

    def __init__(self, memory: int, backend: str, threads: int) -> None:
        self._memory, self._backend, self._threads = _Memory(memory), backend, threads or None
        self._sessions: dict[str, Session] = {}

    def load(self, key: str, path: str, manifest: str) -> None:
        bundle = Bundle.open(path, verify=False)  # the service has hashed it
        if bundle.manifest.model_dump_json() != manifest:
            raise BackendError(
                "The bundle on disk is no longer the one being served; it is being replaced."
            )
        session = open_session(bundle, self._backend, threads=self._threads)
        session.warm_up()
        self._sessions[key] = session

    def unload(self, key: str) -> None:
        self._sessions.pop(key).close()

    def run(
        self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int
    ) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        answer = self._sessions[key].run(self._memory.array(shape, dtype, size))
        np.copyto(self._memory.array(answer.shape, answer.dtype), answer)
        return answer.shape, answer.dtype, self._memory.size


def _serve_pipe(pipe: int, memory: int, backend: str, threads: int) -> None:
    # The service decides when its workers end, also when a terminal signals the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ours, worker = Connection(pipe), _Worker(memory, backend, threads)
    ours.send((None, None))  # ready
    while True:
        problem = answer = None
        try:
            name, *values = ours.recv()
        except (EOFError, OSError):
            return
        try:
            answer = getattr(worker, name)(*values)
        except FDConvError as error:
            problem = str(error)
        except Exception as error:
            problem = f"A worker failed: {type(error).__name__}: {error}"
        try:
            ours.send((problem, answer))
        except OSError:
            return


if __name__ == "__main__":
    _serve_pipe(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
