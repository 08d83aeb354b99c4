"""A request whose body an idle inference thread reads, runs and answers by itself.

Between threads a request waits for one to wake up and for the other to let it go on, on the way to
the model and again on the way back, and its tensor crosses from one core's cache to another's. An
inference thread that has nothing to do may as well take the connection's socket for the time of
one request: if the body arrives without delay, which on a network of today it does.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# For bodies that come more slowly the event loop waits, not an inference thread.
_PATIENCE_MS = 2


@dataclass(frozen=True)
class Slow:
    """The body is not complete; ``at`` bytes of it are there."""

    at: int


class Gone:
    """The client is."""


class NotPlain:
    """The body is complete, and asks for more than is done here."""


class Forestalled:
    """The event loop has answered meanwhile."""


@dataclass(frozen=True)
class Sent:
    """The answer is sent, but for ``rest``; ``last`` says that it ends the connection."""

    rest: list[memoryview]
    last: bool
    run_seconds: float
    begun: float  # on the scheduler's clock

    @property
    def unhurried(self) -> bool:
        """Whether the event loop has nothing more to do for the client."""
        return not self.rest and not self.last


Result = Slow | Gone | NotPlain | Forestalled | Sent


class AtOnce:
    """What the inference thread does.

    :param descriptor: the connection's, non-blocking, to read and write; closed in the end.
    :param room: the body's place, of which ``at`` bytes are filled.
    :param answer: of the complete body: the response's parts, whether it ends the connection, and
        the seconds the network took; None where it asks for more than is done here.

    ``sent`` is the answer's fate, once it is.
    """

    def __init__(
        self,
        descriptor: int,
        room: memoryview,
        at: int,
        answer: Callable[[memoryview], tuple[list[Any], bool, float] | None],
    ) -> None:
        self._descriptor, self._room, self._at, self._answer = descriptor, room, at, answer
        self._claim, self._begun = threading.Lock(), threading.Lock()
        self.sent: Sent | None = None

    def claim(self) -> bool:
        """Take the right to answer; only the first to ask has it."""
        return self._claim.acquire(blocking=False)

    def forget(self) -> None:
        """It is not wanted any more, and may never be called."""
        if self._begun.acquire(blocking=False):
            os.close(self._descriptor)

    def __call__(self) -> Result:
        """Read, run and answer."""
        if not self._begun.acquire(blocking=False):
            return Forestalled()
        try:
            return self._work()
        except ConnectionError:
            return Gone()
        finally:
            os.close(self._descriptor)

    def _work(self) -> Result:
        begun = time.perf_counter()
        if (stopped := self._read()) is not None:
            return stopped
        if self._claim.locked():
            return Forestalled()
        if (answer := self._answer(self._room)) is None:
            return NotPlain()
        parts, last, seconds = answer
        if not self.claim():
            return Forestalled()
        rest = [memoryview(part).cast("B") for part in parts]
        with contextlib.suppress(BlockingIOError):
            sent = os.writev(self._descriptor, rest)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][sent:]
        self.sent = Sent(rest, last, seconds, begun)
        return self.sent

    def _read(self) -> Slow | Gone | None:
        end = time.perf_counter() + _PATIENCE_MS / 1e3
        poll = None
        while self._at < len(self._room):
            try:
                count = os.readv(self._descriptor, [self._room[self._at :]])
            except BlockingIOError:
                if time.perf_counter() > end:
                    return Slow(self._at)
                if poll is None:
                    poll = select.poll()
                    poll.register(self._descriptor, select.POLLIN)
                poll.poll(_PATIENCE_MS)
                continue
            if not count:
                return Gone()
            self._at += count
        return None
