"""How much may be in hand: in time, bodies and memory, in all and for one client."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from fdconv_deploy.serve.batching import After, DeadlineError, fail
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.settings import Settings

# Of the pace known before, what counts beside a request that has just been answered.
_KEPT = 0.9


class Admission:
    """Counts images from the end of their request's body to the end of its work, and its memory.

    A request is refused where it would wait past its deadline, by the pace at which requests are
    answered while there is work. Memory is not refused but waited for, in turn: meanwhile a
    request holds nothing but its body.

    ``on_reject`` is called with the reason of each refusal.
    """

    def __init__(self, settings: Settings, on_reject: Callable[[str], None]) -> None:
        self._settings, self._on_reject = settings, on_reject
        self._clock = time.perf_counter  # of which deadlines are a time
        queue = settings.queue_limit
        self._limit = math.inf if queue is None else settings.workers + queue
        self._clients: Counter[str] = Counter()
        # Bytes, what they are given by, and by when.
        self._turns: deque[tuple[int, asyncio.Future[None], float]] = deque()
        self._lock = threading.Lock()  # of memory_used
        self._since: float | None = None
        self._seconds = self._images = 0.0
        self.in_hand = 0  # images
        self.memory_used = self.body_bytes = 0

    def check_room(self, client: str, images: int = 1, deadline: float = math.inf) -> None:
        """Refuse early, before a body is read, what :meth:`admit` would refuse."""
        settings = self._settings
        if images > self._limit:
            raise RefusedError(
                413,
                f"The request holds {images} images, and {self._limit} is all that the service "
                "takes at a time. Send them in several requests.",
            )
        own = settings.client_limit
        if own is not None and self._clients[client] + images > own:
            raise self._rejected(
                "client",
                "You have as many images in hand here as one client may "
                f"({own}). Wait for answers before sending more.",
                429,
            )
        if self.in_hand + images > self._limit:
            raise self._rejected(
                "queue",
                "The service has as many requests waiting as it takes. Try again in a moment.",
            )
        # With nothing in hand it is tried, whatever was measured before.
        wait = self._backlog_seconds(images)
        if self.in_hand and self._clock() + wait > deadline:
            raise self._too_busy(wait)

    @contextmanager
    def admit(self, client: str, images: int = 1, deadline: float = math.inf) -> Iterator[None]:
        """Hold places for ``images``; refused as by :meth:`check_room`."""
        self.check_room(client, images, deadline)
        if not self.in_hand:
            self._since = None
        self.in_hand += images
        self._clients[client] += images
        try:
            yield
            now = self._clock()
            if self._since is not None:  # the first after a rest tells its latency, and no pace
                self._seconds = _KEPT * self._seconds + now - self._since
                self._images = _KEPT * self._images + images
            self._since = now
            if self._turns:
                self._refuse_late()
        finally:
            self.in_hand -= images
            self._clients[client] -= images
            if not self._clients[client]:
                del self._clients[client]

    def take_body(self, size: int) -> None:
        """Count bytes of a body in, unless they are too many for now (503)."""
        if self.body_bytes + size > self._settings.max_bytes_in_hand:
            raise RefusedError(
                503,
                "The service has as many bytes of requests in hand as it takes. Try again in a "
                "moment.",
                self.retry_after(),
            )
        self.body_bytes += size

    def give_body(self, size: int) -> None:
        """Count bytes of a body out."""
        self.body_bytes -= size

    def take_now(self, size: int) -> bool:
        """Count memory in, if it is free; see :class:`Memory`."""
        most = self._settings.max_memory_in_hand
        if size > most:
            raise RefusedError(
                413,
                f"The request needs {size:,} bytes of memory, and the service works in {most:,}. "
                "Send smaller images, or fewer at a time.",
            )
        with self._lock:
            free = not self._turns and self.memory_used + size <= most
            self.memory_used += size * free
        return free

    async def wait(self, size: int, deadline: float) -> None:
        """Count memory in when it is free; see :class:`Memory`."""
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn = size, given, deadline
        self._turns.append(turn)
        self._refuse_late()
        try:
            with After(deadline - self._clock(), fail, given, DeadlineError()):
                await given
        except BaseException:
            if turn in self._turns:
                self._turns.remove(turn)
                self._next()
            elif not given.cancelled() and given.exception() is None:
                self.give(size)  # it came just before this was cancelled
            raise

    def give(self, size: int) -> None:
        """Count memory out, and give it to those whose turn it is."""
        with self._lock:
            self.memory_used -= size
        self._next()

    def _next(self) -> None:
        while self._turns:
            size, given, _ = self._turns[0]
            with self._lock:
                if self.memory_used + size > self._settings.max_memory_in_hand:
                    return
                self.memory_used += size * (not given.done())
            self._turns.popleft()
            if not given.done():
                given.set_result(None)

    def _refuse_late(self) -> None:
        """Refuse those that wait for memory and cannot be answered by their deadlines any more."""
        for place, (_, given, deadline) in enumerate(self._turns, 1):
            wait = place * self._pace()
            if not given.done() and self._clock() + wait > deadline:
                fail(given, self._too_busy(wait) if wait else DeadlineError())

    def _too_busy(self, wait: float) -> RefusedError:
        return self._rejected(
            "deadline",
            f"The service is too busy to answer by the request's deadline: {wait:.1f} s are "
            "expected. Try again later, or allow more time.",
        )

    def _rejected(self, reason: str, detail: str, status: int = 503) -> RefusedError:
        self._on_reject(reason)
        return RefusedError(status, detail, self.retry_after())

    def _pace(self) -> float:
        """Seconds per image, as far as is known."""
        return self._seconds / self._images if self._images else 0.0

    def _backlog_seconds(self, images: int = 0) -> float:
        """How long what is in hand, and ``images`` more, will take, as far as is known."""
        return (self.in_hand + images) * self._pace()

    def forget_pace(self) -> None:
        """Measure anew, without what a model took to be loaded."""
        self._since, self._seconds, self._images = None, 0.0, 0.0

    def retry_after(self) -> dict[str, str]:
        """The header that says when to come back."""
        seconds = max(self._settings.retry_after_seconds, math.ceil(self._backlog_seconds()))
        return {"Retry-After": str(seconds)}


class Memory:
    """What one request takes of the memory to work in: a context manager, in whose block it may.

    All of it is taken at once, before the work: with a part in hand, requests could wait for one
    another.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission, self._users = admission, 1
        self.size = 0

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self.size and not self._users:
            self._admission.give(self.size)

    def hold(self, running: Future[Any]) -> None:
        """Keep it until a call that nobody waits for has ended as well."""
        self._users += 1
        loop = asyncio.get_running_loop()
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self.__exit__))

    def take_now(self, size: int) -> bool:
        """Take ``size`` bytes if they are free and nobody waits; from any thread."""
        if self._admission.take_now(size):
            self.size = size
        return self.size == size

    async def take(self, size: int, deadline: float = math.inf) -> None:
        """Take ``size`` bytes, unless that was done, in the order of asking.

        Refused with 413 if there are never so many, and with 503 as soon as it is known that the
        request will not be answered by its deadline.
        """
        if not self.size and not self.take_now(size):
            await self._admission.wait(size, deadline)
            self.size = size
