"""Threads for what must not run on the event loop, and a bound on how much may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from .problems import RefusedError
from .settings import Settings

T = TypeVar("T")


class Workers:
    """One pool for inference, one for images' codecs; used from one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._inference = ThreadPoolExecutor(settings.workers, "inference")
        self._codecs = ThreadPoolExecutor(settings.codec_threads, "codec")
        self._admitted = 0

    @property
    def admitted(self) -> int:
        """Requests now being answered or waiting for it."""
        return self._admitted

    def check_room(self) -> None:
        """Refuse early, before a body is read, what :meth:`admit` would refuse.

        :raises RefusedError: 503, the queue is full.
        """
        if self._admitted >= self._settings.workers + self._settings.queue_limit:
            raise RefusedError(
                503,
                "The service has as many requests waiting as it takes. Try again in a moment.",
                {"Retry-After": str(self._settings.retry_after_seconds)},
            )

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place among the requests being answered.

        :raises RefusedError: 503, the queue is full.
        """
        self.check_room()
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def infer(self, call: Callable[[], T]) -> T:
        """Run ``call`` on an inference thread."""
        return await asyncio.get_running_loop().run_in_executor(self._inference, call)

    async def code(self, call: Callable[[], T]) -> T:
        """Run ``call`` on a codec thread."""
        return await asyncio.get_running_loop().run_in_executor(self._codecs, call)

    def close(self) -> None:
        """Finish what was begun and end the threads."""
        self._inference.shutdown(wait=True)
        self._codecs.shutdown(wait=True)
