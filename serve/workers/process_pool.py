"""Inference in child processes: a crash in native code costs one worker, not the service.

Tensors cross in memory that both processes map; the pipe carries only what is to be done.
Each inference thread of the service drives one child. A child that ends, or exceeds the time
for a run, is replaced at once, and its request is answered with a 503 that may be retried.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.batching import WorkerDiedError
from fdconv_deploy.serve.settings import Settings

from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime import Bundle, Session, open_session

log = logging.getLogger("fdconv.serve")
_START_SECONDS = 120.0
Array = npt.NDArray[Any]


def shared_file() -> int:
    """A descriptor of memory that a child may map too."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fdconv-worker")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Child:
    """One worker process. Not for use from several threads at once; hold ``lock``."""

    def __init__(self, settings: Settings) -> None:
        self.lock = threading.Lock()
        self._settings = settings
        self._limit = settings.run_timeout_seconds
        self._models: dict[str, tuple[str, str]] = {}  # key -> (path, manifest's identity)
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid

    def load(self, key: str, path: str, digest: str) -> None:
        """Open a bundle under ``key`` and run each of its graphs once."""
        self._ask(("load", key, path, digest), _START_SECONDS)
        self._models[key] = path, digest

    def unload(self, key: str) -> None:
        """Let go of a bundle."""
        if self._models.pop(key, None):
            self._ask(("unload", key), self._limit)

    def run(self, key: str, inputs: npt.NDArray[Any]) -> Array:
        """As ``Session.run``, in the child."""
        if key not in self._models:
            raise WorkerDiedError("the worker was replaced and does not have this model yet")
        self._reserve(inputs.nbytes)
        np.copyto(np.frombuffer(self._memory, inputs.dtype, inputs.size), inputs.reshape(-1))
        _, shape, dtype, size = self._ask(
            ("run", key, inputs.shape, inputs.dtype, self._size), self._limit
        )
        if size > self._size:  # the answer did not fit: the child has made room
            self._map(size)
        count = int(np.prod(shape))
        return np.frombuffer(self._memory, dtype, count).reshape(shape).copy()

    def restart(self) -> None:
        """End the process, start another, and load what it had."""
        self._end()
        self._start()
        for key in list(self._models):
            self._load_again(key)

    def close(self) -> None:
        """End the process."""
        self._end()

    def _load_again(self, key: str) -> None:
        try:
            self.load(key, *self._models[key])
        except BackendError as error:
            del self._models[key]
            log.error("worker %d: %s", self.pid, error)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._file = shared_file()
        self._size = 0
        self._memory: Any = b""
        command = [
            sys.executable,
            "-m",
            "fdconv_deploy.serve.workers.child",
            str(theirs.fileno()),
            str(self._file),
            self._settings.backend,
            str(self._settings.threads or 0),
        ]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=(theirs.fileno(), self._file), stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._answer(_START_SECONDS)

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._memory = b""
        os.close(self._file)
        self._process = None

    def _ask(self, message: tuple[Any, ...], limit: float) -> Any:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._died("ended") from error
        return self._answer(limit)

    def _answer(self, limit: float) -> Any:
        try:
            if not self._pipe.poll(limit):
                raise self._died(f"did not answer within {limit:g} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died("ended") from error
        if answer[0] == "error":
            raise BackendError(answer[1])
        return answer

    def _died(self, how: str) -> WorkerDiedError:
        assert self._process is not None
        log.error("the worker process %d %s", self._process.pid, how)
        return WorkerDiedError(f"the worker process {how}")

    def _reserve(self, size: int) -> None:
        if size > self._size:
            os.ftruncate(self._file, size)
            self._map(size)

    def _map(self, size: int) -> None:
        self._memory = mmap.mmap(self._file, size)
        self._size = size


class Children:
    """The worker processes, one for each inference thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._all: list[Child] = []
        self._free: list[Child] = []
        self._changed = threading.Lock()
        self._mine = threading.local()

    def __iter__(self) -> Iterator[Child]:
        return iter(self._all)

    def start(self) -> None:
        """Start the processes."""
        self._all = [Child(self._settings) for _ in range(self._settings.workers)]
        self._free = list(self._all)

    def run(self, key: str, inputs: npt.NDArray[Any]) -> Array:
        """Run on the calling thread's child, which is replaced if it dies.

        :raises WorkerDiedError: it did.
        """
        child = self._own()
        with child.lock:
            try:
                return child.run(key, inputs)
            except WorkerDiedError:
                child.restart()
                raise

    def each(self, call: Callable[[Child], None]) -> None:
        """Do something with every child in turn, between their runs."""
        for child in self._all:
            with child.lock:
                try:
                    call(child)
                except WorkerDiedError as error:
                    child.restart()
                    raise BackendError(f"A worker could not be prepared: {error}.") from error

    def close(self) -> None:
        """End them all."""
        for child in self._all:
            child.close()

    def _own(self) -> Child:
        child: Child | None = getattr(self._mine, "child", None)
        if child is None:
            with self._changed:
                # An inference thread that died may have left its child: they are as good.
                child = self._free.pop(0) if self._free else self._all[0]
            self._mine.child = child
        return child


class IsolatedSession(Session):
    """A session whose runs happen in the worker processes; here it only prepares and finishes."""

    def __init__(self, bundle: Bundle, settings: Settings, children: Children) -> None:
        here = open_session(bundle, "onnxruntime-cpu", threads=1)
        super().__init__(bundle, here._backend, "It runs in worker processes.", {})
        self._children = children
        self._key = f"{bundle.path}\0{id(self)}"
        self._digest = bundle.manifest.model_dump_json()
        self._named = settings.backend

    @property
    def backend(self) -> str:
        """The backend asked for; each worker process chooses for itself when it is "auto"."""
        return f"{self._named} (worker processes)"

    @property
    def ways(self) -> dict[int, str]:
        """Nothing: each worker process measures and chooses for itself."""
        return {}

    def run(self, batch: npt.NDArray[Any]) -> Array:
        """See :meth:`Session.run`."""
        return self._children.run(self._key, np.ascontiguousarray(batch))

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> float:
        """Load the bundle in every worker, or time one run of these batch sizes."""
        import time

        start = time.perf_counter()
        if batch_sizes is None:
            path = str(self.bundle.path)
            self._children.each(lambda child: child.load(self._key, path, self._digest))
            return time.perf_counter() - start
        for batch in batch_sizes:
            zeros = self.blank(batch)
            first = next(iter(self._children))
            with first.lock:
                first.run(self._key, zeros)
        return time.perf_counter() - start

    def close(self) -> None:
        """Let go of the bundle in every worker."""
        super().close()
        self._children.each(lambda child: child.unload(self._key))
