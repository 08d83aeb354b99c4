"""A worker process: opens bundles and runs them for the service that started it.

Started by `process_pool` as ``python -m fdconv_deploy.serve.workers.child PIPE MEMORY BACKEND
THREADS``, never by hand. It ends when the service's end of the pipe is closed.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.runtime import Bundle, Session, open_session


class Worker:
    """The child's side of the pipe."""

    def __init__(self, memory: int, backend: str, threads: int) -> None:
        self._file, self._backend, self._threads = memory, backend, threads or None
        self._memory: Any = b""
        self._size = 0
        self._sessions: dict[str, Session] = {}

    def load(self, key: str, path: str, digest: str) -> tuple[Any, ...]:
        """Open and warm up a bundle, which must still be the one the service opened."""
        bundle = Bundle.open(path, verify=False)  # the service has hashed it
        if bundle.manifest.model_dump_json() != digest:
            raise BackendError(
                "The bundle on disk is no longer the one being served; it is being replaced."
            )
        session = open_session(bundle, self._backend, threads=self._threads)
        session.warm_up()
        self._sessions[key] = session
        return ("done",)

    def unload(self, key: str) -> tuple[Any, ...]:
        """Close a bundle."""
        self._sessions.pop(key).close()
        return ("done",)

    def run(
        self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int
    ) -> tuple[Any, ...]:
        """Run what lies in the shared memory and leave the answer there."""
        if size != self._size:
            self._map(size)
        count = int(np.prod(shape))
        inputs = np.frombuffer(self._memory, dtype, count).reshape(shape)
        answer = self._sessions[key].run(inputs)
        if answer.nbytes > self._size:
            os.ftruncate(self._file, answer.nbytes)
            self._map(answer.nbytes)
        np.copyto(np.frombuffer(self._memory, answer.dtype, answer.size), answer.reshape(-1))
        return ("done", answer.shape, answer.dtype, self._size)

    def _map(self, size: int) -> None:
        self._memory = mmap.mmap(self._file, size)
        self._size = size


def main(arguments: list[str]) -> None:
    """Serve the pipe until it closes."""
    # The service decides when its workers end, also when a terminal signals the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Connection(int(arguments[0]))
    worker = Worker(int(arguments[1]), arguments[2], int(arguments[3]))
    handlers: dict[str, Any] = {"load": worker.load, "unload": worker.unload, "run": worker.run}
    pipe.send(("ready",))
    while True:
        try:
            name, *values = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = handlers[name](*values)
        except FDConvError as error:
            answer = ("error", str(error))
        except Exception as error:
            answer = ("error", f"A worker failed: {type(error).__name__}: {error}")
        try:
            pipe.send(answer)
        except OSError:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
