"""Uvicorn's HTTP protocol with patience that ends, for clients that send or read too slowly.

What is held against one connection: the time to its headers, the time to its body, the time
it may leave an answer unread, and the size of its address and headers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import Settings

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
MAX_URL_BYTES = 8 << 10
# A stopping server gives a connection this long to send the request it may be sending.
_LAST_REQUEST_SECONDS = 0.5


class GuardedProtocol(HttpToolsProtocol):
    """One connection. ``settings`` is set on a subclass by :func:`guarded`."""

    settings: Settings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._size = self._count = 0
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._stop("_sending")
        self._stop("_reading")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if self.parser is None or self.transport.is_closing():
            return  # refused already; what still arrives is not read
        super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._size = self._count = 0
        if self._sending is None:
            self._await_headers()

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(b"414 URI Too Long", "The address is too long.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._count += 1
        self._size += len(name) + len(value)
        if self._count > MAX_HEADERS or self._size > MAX_HEADER_BYTES:
            self._refuse(b"431 Request Header Fields Too Large", "The headers are too large.")
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers are there; the body follows."""
        self._stop("_sending")
        if self.transport.is_closing():
            return
        self._sending = self.loop.call_later(self.settings.body_seconds, self._too_slow)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is there."""
        self._stop("_sending")
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is written."""
        super().on_response_complete()
        if getattr(self, "_last", False) and not self.transport.is_closing():
            self.transport.close()

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer is written."""
        super().pause_writing()
        if self._reading is None:
            self._reading = self.loop.call_later(self.settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._stop("_reading")
        super().resume_writing()

    def shutdown(self) -> None:
        """The server stops: finish what there is, and what is perhaps on its way."""
        self._last = True
        if self.cycle is None or self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self.loop.call_later(_LAST_REQUEST_SECONDS, self._close_if_idle)
        else:
            self.cycle.keep_alive = False

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _await_headers(self) -> None:
        self._sending = self.loop.call_later(self.settings.header_seconds, self._no_headers)

    def _no_headers(self) -> None:
        self._sending = None
        if self.headers is None:  # not a byte of a request: there is nothing to answer
            self.transport.abort()
        else:
            self._refuse(b"408 Request Timeout", "The request did not arrive in time.")

    def _too_slow(self) -> None:
        self._sending = None
        if self.cycle.response_started:
            self.transport.abort()
            return
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        self._refuse(b"408 Request Timeout", "The request's body did not arrive in time.")

    def _refuse(self, status: bytes, sentence: str) -> None:
        if self.transport.is_closing():
            return
        text = f"{sentence} Send less, or faster.\n".encode()
        self.transport.write(
            b"HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n"
            b"Connection: close\r\n\r\n%s" % (status, len(text), text)
        )
        self.transport.close()

    def _stop(self, name: str) -> None:
        timer = getattr(self, name, None)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


def guarded(settings: Settings) -> Callable[..., Any]:
    """The protocol class with these settings, for ``uvicorn.Config(http=...)``."""
    return type("Guarded", (GuardedProtocol,), {"settings": settings})
