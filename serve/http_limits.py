"""What uvicorn lacks against slow clients and long headers; `uploads` limits the bodies."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fdconv_deploy.serve.settings import Settings

MAX_HEAD_BYTES = 32 << 10  # address and headers, unless they come in one piece
LINGER_SECONDS = 2.0  # to read why: a refused client that is cut off at once loses the answer
LAST_REQUEST_SECONDS = 0.5  # for a request that is on its way when the server stops
# Makes headers and body of an answer of the peer's address, the answer's status, its sentence, and
# the ASGI scope, if any.
Refusal = Callable[[str, int, str, Any], tuple[list[tuple[bytes, bytes]], bytes]]


@dataclass
class Held:
    """The connections of a server that wait for their clients, the longest first."""

    idle: dict[LimitedProtocol, None] = field(default_factory=dict)  # for a request
    unread: dict[LimitedProtocol, None] = field(default_factory=dict)  # to read an answer


class LimitedProtocol(H11Protocol):
    """One HTTP/1.1 connection."""

    def __init__(self, settings: Settings, refusal: Refusal, held: Held, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._settings, self._refusal, self._held = settings, refusal, held
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._awaited, self._refused, self._stopping = object(), False, False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Limit the time to the first request."""
        super().connection_made(transport)
        self.app_state["connections"] = self.connections  # which the middleware limits
        for _ in range(len(self.connections) - self._settings.max_connections):
            self._end_longest()
        self._held.idle[self] = None
        self._limit_receiving()

    def _end_longest(self) -> None:
        """Let nobody be kept out by who is idle or, failing that, does not read his answers."""
        idle, unread = self._held.idle, self._held.unread
        read = (one for one in idle if not one.transport.get_write_buffer_size())
        waiting = (one for one in unread if one.transport.get_write_buffer_size())
        if (longest := next(chain(read, waiting), None)) is not None:
            idle.pop(longest, None)
            unread.pop(longest, None)
            self.connections.discard(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for timer in self._timers.values():
            timer.cancel()
        self._held.idle.pop(self, None)
        self._held.unread.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Limit the time to the rest of a request; after a refusal, discard."""
        if not self._refused:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._held.idle.pop(self, None)
            self._limit_receiving()

    def on_response_complete(self) -> None:
        """Discard what still comes of an answered request, but not for ever."""
        super().on_response_complete()
        if self.cycle.response_complete:  # and no other request had come already
            self._held.idle[self] = None
        self._limit_receiving()
        self._limit_writing()  # less than 64 KiB unread, of which no transport tells

    def _limit_receiving(self) -> None:
        state, cycle = self.conn.their_state, self.cycle
        answered = cycle is not None and cycle.response_complete
        if state is h11.SEND_BODY:  # the application limits it, if it reads it
            seconds = LINGER_SECONDS + (0 if answered else self._settings.body_seconds)
        elif state is h11.IDLE and (cycle is None or self.conn.trailing_data[0]):
            seconds = self._settings.header_seconds
        else:
            seconds = None  # between requests, uvicorn limits keep-alive
        awaited = seconds and (cycle, state, answered)
        if awaited != self._awaited and not self._refused:
            self._awaited = awaited
            self._start("receiving", seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.their_state is not h11.IDLE or not self.conn.trailing_data[0]:
            self.transport.abort()
            return
        seconds = self._settings.header_seconds
        self._refuse(408, f"The headers did not arrive within {seconds:g} s. Send them faster.")

    def pause_writing(self) -> None:
        """Limit the time in which the client reads nothing."""
        super().pause_writing()
        self._limit_writing()

    def _limit_writing(self, before: float = float("inf")) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread >= before:
            self.transport.abort()
            return
        if unread:
            self._held.unread.setdefault(self)
            self._bound_unread()
        else:
            self._held.unread.pop(self, None)
        if unread or self.transport.is_closing():  # over TLS the client has to agree to that
            seconds = self._settings.write_seconds
            if self._stopping:
                seconds = min(seconds, LINGER_SECONDS)
            self._start("writing", seconds, partial(self._limit_writing, unread))

    def _bound_unread(self) -> None:
        """Let go of answers that wait longest, where all together are more than may be."""
        sizes = {one: one.transport.get_write_buffer_size() for one in self._held.unread}
        left = sum(sizes.values()) - self._settings.max_bytes_in_hand
        for one, size in sizes.items():
            if left <= 0 or one is self:
                return
            if size:
                one.transport.abort()
                left -= size

    def _start(self, name: str, seconds: float | None, then: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()
        if seconds is not None:
            self._timers[name] = self.loop.call_later(seconds, then)

    def _should_upgrade(self) -> bool:
        return False  # such as h2c, which is an offer and no order; uvicorn would log a fault

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; uvicorn calls this."""
        error = sys.exc_info()[1]  # h11's, which knows the status
        if getattr(error, "error_status_hint", 400) == 431:
            self._refuse(431, f"The headers have more than {MAX_HEAD_BYTES:,} bytes. Send fewer.")
        else:
            self._refuse(400, f"This is no valid HTTP/1.1 request ({error!s:.100}). Correct it.")

    def _refuse(self, status: int, detail: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer has begun
            return
        cycle = None if self.cycle is None or self.cycle.response_complete else self.cycle
        peer = self.client[0] if self.client else ""
        headers, body = self._refusal(peer, status, detail, cycle and cycle.scope)
        headers = [*headers, (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        response = h11.Response(
            status_code=status, headers=headers, reason=HTTPStatus(status).phrase
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        if cycle is not None:  # the application learns that nobody waits any more
            cycle.disconnected = True
            cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start("receiving", LINGER_SECONDS, self.transport.close)

    def shutdown(self) -> None:
        """Finish what there is, and what is perhaps on its way; the server stops."""
        idle = self.cycle is None or self.cycle.response_complete
        self._start("stopping", LAST_REQUEST_SECONDS if idle else 0, self._stop)

    def _stop(self) -> None:
        self._stopping = True
        super().shutdown()
        self._limit_writing()
