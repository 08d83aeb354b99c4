"""Inference in child processes: a crash in native code costs one worker, not the service.

Tensors cross in memory that both processes map; a pipe carries only what is to be done. A bundle's
files cross so, too: the service reads and hashes them once, and a child that starts anew gets the
same bytes, whatever became of the folder. A child that ends, or exceeds the time for a run, is
replaced at once, and its request is answered with a 503 that may be retried.

A child is this module, run as ``python -m fdconv_deploy.serve.workers PIPE MEMORY BACKEND
THREADS``. It ends when the service's end of the pipe is closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.runtime import Bundle, Session, Tensors, open_session
from fdconv_deploy.runtime.batching import linear_cost
from fdconv_deploy.runtime.bundle import Bytes
from fdconv_deploy.runtime.graph_runner import Runner
from fdconv_deploy.runtime.manifest import Manifest
from fdconv_deploy.serve.batching import WorkerDiedError
from fdconv_deploy.serve.settings import Settings

log = logging.getLogger("fdconv.serve")
_START_SECONDS = 120.0
T = TypeVar("T")
Array = npt.NDArray[Any]
# Each tensor's name, shape, dtype, and its place in the memory in bytes.
_Layout = list[tuple[str, tuple[int, ...], str, int]]
_ALIGNED = 64  # bytes


def _shared_file() -> int:
    """A descriptor of memory that a child may map too."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fdconv-worker", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Memory:
    """Memory of a file that both processes map."""

    def __init__(self, file: int) -> None:
        self.file, self.size = file, 0
        self._map: Any = b""

    def write(self, tensors: Tensors) -> tuple[_Layout, int]:
        """Copy tensors into it, one after another; their layout and the file's size now."""
        layout: _Layout = []
        end = 0
        for name, value in tensors.items():
            layout.append((name, value.shape, value.dtype.str, end))
            end += -(-value.nbytes // _ALIGNED) * _ALIGNED
        if end > self.size:
            os.ftruncate(self.file, end)
        for name, view in self.read(layout, max(end, self.size)).items():
            np.copyto(view, tensors[name])
        return layout, self.size

    def read(self, layout: _Layout, size: int) -> dict[str, Array]:
        """Views of the tensors in it; ``size`` is the file's, which the other side may grow."""
        if size > self.size:
            self._map, self.size = mmap.mmap(self.file, size), size
        return {name: np.ndarray(shape, kind, self._map, at) for name, shape, kind, at in layout}


class BundleMemory:
    """A bundle's files in memory that every worker maps and, on Linux, nobody can change."""

    def __init__(self, bundle: Bundle) -> None:
        self.file = _shared_file()
        places: dict[str, tuple[int, int]] = {}  # where each begins, and its length in bytes
        with open(self.file, "wb", closefd=False) as file:
            for name, data in bundle.hold().items():
                places[name] = file.tell(), len(data)
                file.write(data)
                file.write(bytes(-len(data) % _ALIGNED))
        bundle.release()
        # What a worker needs to know of it.
        self.contents = str(bundle.path), bundle.manifest.model_dump_json(), places
        if hasattr(os, "memfd_create"):
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        """Let go of it; workers keep what they have mapped."""
        os.close(self.file)


class Child:
    """One worker process, for one thread at a time; see :meth:`use`."""

    def __init__(self, settings: Settings) -> None:
        self._lock = threading.Lock()
        self._settings = settings
        self._models: dict[str, BundleMemory] = {}
        self._start()

    def load(self, key: str, memory: BundleMemory) -> str:
        """Open a bundle under ``key`` and run each of its graphs once; its ``operators``."""
        message = "load", key, *memory.contents
        operators = self._ask(*message, file=memory.file, limit=_START_SECONDS)
        self._models[key] = memory
        return str(operators)

    def unload(self, key: str) -> None:
        """Let go of a bundle."""
        if self._models.pop(key, None):
            self._ask("unload", key)

    def run(self, key: str, feeds: Tensors) -> dict[str, Array]:
        """As ``Session.run_batches``, in the child."""
        if key not in self._models:
            raise WorkerDiedError("the worker was replaced and does not have this model yet")
        answer = self._memory.read(*self._ask("run", key, *self._memory.write(feeds)))
        return {name: value.copy() for name, value in answer.items()}

    def use(self, call: Callable[[Child], T]) -> T:
        """Do something with it while nobody else does; it is replaced if it dies meanwhile."""
        with self._lock:
            try:
                return call(self)
            except WorkerDiedError:
                self.close()
                self._start()
                models, self._models = self._models, {}
                for key, model in models.items():
                    with contextlib.suppress(BackendError):  # which its requests are told
                        self.load(key, model)
                raise

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
        self.pid = self._process.pid
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._receive(_START_SECONDS)

    def _ask(self, *message: Any, file: int | None = None, limit: float | None = None) -> Any:
        try:
            self._pipe.send(message)
            if file is not None:
                send_handle(self._pipe, file, self.pid)
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
    """The worker processes, as many as there are inference threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.all: list[Child] = []
        self._free: queue.SimpleQueue[Child] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the processes."""
        for _ in range(self._settings.workers):
            self.all.append(Child(self._settings))
            self._free.put(self.all[-1])

    def run(self, key: str, feeds: Tensors) -> dict[str, Array]:
        """Run on a child that is free, which is replaced if it dies (WorkerDiedError)."""
        child = self._free.get()
        try:
            return child.use(lambda child: child.run(key, feeds))
        finally:
            self._free.put(child)

    def each(self, call: Callable[[Child], None]) -> None:
        """Do something with every child in turn, between their runs."""
        try:
            for child in self.all:
                child.use(call)
        except WorkerDiedError as error:
            raise BackendError(f"A worker could not be prepared: {error}.") from error

    def close(self) -> None:
        """End them all."""
        for child in self.all:
            child.close()


class RemoteRunner(Runner):
    """Runs a bundle in other processes, each of which measures and chooses for itself."""

    operators = ""

    def __init__(self, backend: str, choice: str) -> None:
        self.backend, self.choice, self.ways = backend, choice, {}
        self.batch_cost, self.closed = linear_cost, False

    def run_raw(self, feeds: Tensors) -> dict[str, Array]:
        """See :meth:`Runner.run_raw`."""
        return self.run_batches(feeds)

    def close(self) -> None:
        """See :meth:`Runner.close`."""
        self.closed = True


class WorkerRunner(RemoteRunner):
    """Runs a bundle in the worker processes; its session only prepares and finishes."""

    def __init__(self, bundle: Bundle, settings: Settings, children: Children) -> None:
        super().__init__(f"{settings.backend} (worker processes)", "It runs in worker processes.")
        self._bundle, self._children = bundle, children
        self._key = f"{bundle.path}\0{id(self)}"
        self._memory: BundleMemory | None = None

    def run_batches(self, feeds: Tensors) -> dict[str, Array]:
        """See :meth:`Runner.run_batches`."""
        return self._children.run(self._key, feeds)

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> None:
        """Load the bundle in every worker, which runs every batch size once."""
        memory = self._memory = self._memory or BundleMemory(self._bundle)

        def load(child: Child) -> None:
            self.operators = child.load(self._key, memory)

        self._children.each(load)

    def close(self) -> None:
        """Let go of the bundle in every worker."""
        super().close()
        for child in self._children.all:
            with contextlib.suppress(WorkerDiedError):  # its successor has not loaded it
                child.use(lambda child: child.unload(self._key))
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class _Worker:
    """The child's side: each method answers one kind of message."""

    def __init__(self, memory: int, backend: str, threads: int) -> None:
        self._memory, self._backend, self._threads = _Memory(memory), backend, threads or None
        self._sessions: dict[str, Session] = {}

    def load(
        self, key: str, path: str, manifest: str, places: dict[str, tuple[int, int]], file: int
    ) -> str:
        mapped = memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ))
        os.close(file)
        contents: dict[str, Bytes] = {k: mapped[at : at + n] for k, (at, n) in places.items()}
        bundle = Bundle(Path(path), Manifest.model_validate_json(manifest), contents=contents)
        session = open_session(bundle, self._backend, threads=self._threads)
        session.warm_up()
        self._sessions[key] = session
        return session.operators

    def unload(self, key: str) -> None:
        self._sessions.pop(key).close()

    def run(self, key: str, layout: _Layout, size: int) -> tuple[_Layout, int]:
        feeds = self._memory.read(layout, size)
        return self._memory.write(self._sessions[key].run_batches(feeds))


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
            if name == "load":
                values.append(recv_handle(ours))
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
