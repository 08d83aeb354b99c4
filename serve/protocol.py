"""Uvicorn's HTTP protocol with patience that ends, for clients that send or read too slowly.

What is held against one connection: the time to its headers, the time to its body, the time
it may leave an answer unread, and the size of its address and headers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
from fdconv_deploy.serve.client_connection import Exchange, Front, Reader
from fdconv_deploy.serve.errors import MEDIA_TYPE, REQUEST_ID, problem
from fdconv_deploy.serve.logging import log_access
from fdconv_deploy.serve.middleware import SECURITY, accepted_id
from fdconv_deploy.serve.settings import Settings
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
MAX_URL_BYTES = 8 << 10
# Asked by those who would end a service that does not answer: never turned away.
_HEALTH = (b"/healthz", b"/readyz", b"/v2/health/live", b"/v2/health/ready")
# After an answer that ends the connection: for what the client is still sending, so that it
# comes to read the answer. Closed at once, the connection would be reset and the answer lost.
_LINGER_SECONDS = 2.0
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
        # The exchanges not answered yet, with uvicorn's cycles; several when pipelined.
        self._exchanges: dict[Exchange, Any] = {}
        self._parted = self._garbled = False
        self.url = b""
        self._closing = _Closing(transport, self._part)
        self._front = Front(self)
        self._let_receive(self._front)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._stop("_sending")
        self._stop("_reading")
        super().connection_lost(exc)
        for exchange in list(self._exchanges):
            exchange.lost()
        self._exchanges.clear()

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if self.parser is None or self._over:
            return  # answered already; what still arrives is not looked at
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
            self._refuse(
                414, f"The address is longer than {MAX_URL_BYTES:,} bytes. Send a shorter one."
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if self._over:
            return
        self._count += 1
        self._size += len(name) + len(value)
        if self._count > MAX_HEADERS or self._size > MAX_HEADER_BYTES:
            self._refuse(
                431,
                f"The request has more than {MAX_HEADERS} headers, or more than "
                f"{MAX_HEADER_BYTES:,} bytes of them. Send fewer.",
            )
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers are there; the body follows."""
        self._stop("_sending")
        if self._over:
            return
        most = self.settings.max_connections
        if len(self.connections) > most and self.url not in _HEALTH:
            self._refuse(
                503,
                f"The service has {most} connections open, all it takes. Try again in a moment.",
            )
            return
        self._sending = self.loop.call_later(self.settings.body_seconds, self._too_slow)
        exchange = Exchange(self)
        exchange.offer(self.scope)  # type: ignore[arg-type]
        super().on_headers_complete()
        self.cycle.transport = self._closing  # type: ignore[assignment]
        self._exchanges[exchange] = self.cycle

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._over:
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is there."""
        self._stop("_sending")
        if self._over:
            return
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is written."""
        if self._parted:
            self.pipeline.clear()  # the client was told that it is the last
        super().on_response_complete()
        # Answers leave in the order of their requests.
        if self._exchanges:
            del self._exchanges[next(iter(self._exchanges))]
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

    def take_received(self, exchange: Exchange) -> tuple[bytearray, bool]:
        """See ``receiving.Connection``."""
        cycle = self._exchanges.get(exchange)
        if cycle is None or cycle.disconnected:
            raise ClientDisconnect
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        found, cycle.body = cycle.body, bytearray()
        return found, cycle.more_body

    def lend(self, reader: Reader) -> None:
        """See ``receiving.Connection``."""
        self._let_receive(reader)

    def take_back(self) -> None:
        """See ``receiving.Connection``."""
        # The parser still waits for the body it has not seen.
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._let_receive(self._front)
        self._stop("_sending")
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def stop_receiving(self) -> None:
        """See ``receiving.Connection``."""
        self._let_receive(self._front)
        self._parted = True  # the answer to come is the last

    def hang_up(self) -> None:
        """See ``receiving.Connection``."""
        self.transport.abort()

    def _let_receive(self, protocol: asyncio.BaseProtocol) -> None:
        if self.transport.is_closing():
            return
        # Transports choose how they read when they begin to.
        self.transport.pause_reading()
        self.transport.set_protocol(protocol)
        self.flow.read_paused = False
        self.transport.resume_reading()

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
            self._refuse(
                408,
                "The request's headers did not arrive within "
                f"{self.settings.header_seconds:g} s. Send it faster.",
            )

    def _too_slow(self) -> None:
        self._sending = None
        if self.cycle.response_started:
            self.transport.abort()
            return
        self._refuse(
            408,
            f"The request's body did not arrive within {self.settings.body_seconds:g} s. Send it "
            "faster, or less of it.",
        )

    def send_400_response(self, msg: str) -> None:
        """See uvicorn; what came is no HTTP."""
        before = self._under_way()
        if before is None or before.more_body:
            self._refuse(400, "What was sent is not a valid HTTP/1.1 request. Correct it.")
            return
        # It follows a whole request, which has its answer first: that is then the last one.
        self._stop("_sending")
        before.keep_alive, self._garbled = False, True
        self.flow.pause_reading()

    def _under_way(self) -> Any:
        """The request, as uvicorn's cycle, that the application is answering; else None."""
        cycle = self.cycle
        return None if cycle is None or cycle.response_complete else cycle

    def _refuse(self, status: int, detail: str) -> None:
        """Answer before, or instead of, the application."""
        if self._over:
            return
        self._stop("_sending")
        request_id = self._refused(status)
        document = problem(request_id, status, detail, kserve=self.url.startswith(b"/v2"))
        body = json.dumps(document).encode()
        retry = self.settings.retry_after_seconds if status == 503 else None
        head = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"Content-Type: {MEDIA_TYPE}",
            f"Content-Length: {len(body)}",
            f"{REQUEST_ID}: {request_id}",
            *([] if retry is None else [f"Retry-After: {retry}"]),
            *(f"{name.decode()}: {value.decode()}" for name, value in SECURITY),
            "Connection: close\r\n\r\n",
        ]
        self.transport.write("\r\n".join(head).encode() + body)
        self._part(whole=False)

    def _refused(self, status: int) -> str:
        """Have a refusal counted and logged, once; the request's id."""
        cycle = self._under_way()
        if cycle is not None:  # the application does, when it finds that nobody waits any more
            state = cycle.scope["state"]
            state["refused"] = status
            cycle.disconnected = True
            cycle.message_event.set()
            if "request_id" in state:
                return str(state["request_id"])
        given = dict(self.headers or ()).get(REQUEST_ID.lower().encode(), b"")
        request_id = accepted_id(given.decode("latin-1"))
        if cycle is None:
            service = getattr(getattr(self.config.app, "state", None), "service", None)
            if service is not None:
                service.metrics.requests.labels("unmatched", str(status)).inc()
            log_access(
                request_id=request_id,
                client=self.client[0] if self.client else "",
                path=self.url.decode("ascii", "replace")[:400],
                status=status,
            )
        else:
            state["request_id"] = request_id
        return request_id

    @property
    def _over(self) -> bool:
        """Whether the connection's last answer is written."""
        return self._parted or self.transport.is_closing()

    def _part(self, *, whole: bool | None = None) -> None:
        """Close the connection once the client has had time to read.

        :param whole: whether nothing more of the request is to come.
        """
        if whole is None:
            whole = not self.cycle.more_body
        whole = whole and not self._garbled
        if whole or self.transport.is_closing():
            self.transport.close()
            return
        self._parted = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _stop(self, name: str) -> None:
        timer = getattr(self, name, None)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


class _Closing:
    """The transport to uvicorn's cycle, whose closing is the protocol's to do."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, close


def guarded(settings: Settings) -> Callable[..., Any]:
    """The protocol class with these settings, for ``uvicorn.Config(http=...)``."""
    return type("Guarded", (GuardedProtocol,), {"settings": settings})
