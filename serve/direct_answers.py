"""The part of a connection's protocol that answers without ASGI."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fdconv_deploy.serve.client_connection import Exchange, Reader
from fdconv_deploy.serve.kserve.plain_call import PlainCall
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class DirectAnswers(HttpToolsProtocol):
    """See ``plain_call.Connection``; the rest is `fdconv_deploy.serve.protocol`'s."""

    # What it finds in the class that has it.
    _exchanges: dict[Any, Any]
    _parted: bool
    _over: Any
    _let_receive: Any
    _enter: Any
    _part: Any
    _refuse: Any

    @property
    def _own(self) -> Any:
        """This, as the connection that it is part of."""
        return self

    def answer(self, call: PlainCall, head: bytes, parts: list[Any]) -> None:
        """See ``plain_call.Connection``."""
        if self._over or call.disconnected:
            return
        last = self.is_last(call)
        self.sent(call, [self.head(head, last=last) + parts[0], *parts[1:]], last=last)

    def is_last(self, call: PlainCall) -> bool:
        """See ``plain_call.Connection``."""
        return not call.keep_alive or self.config.app.state.service.draining  # type: ignore[union-attr]

    def head(self, lines: bytes, *, last: bool) -> bytes:
        """See ``plain_call.Connection``."""
        common = [
            name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers
        ]
        return b"".join([lines, *common, b"connection: close\r\n\r\n" if last else b"\r\n"])

    def sent(self, call: PlainCall, rest: list[Any], *, last: bool) -> None:
        """See ``plain_call.Connection``."""
        for part in rest:
            self.transport.write(part)
        call.response_started = call.response_complete = True
        if last:
            self._part(whole=not call.more_body)
        self.on_response_complete()

    def lend_socket(self) -> int | None:
        """See ``plain_call.Connection``."""
        transport = self.transport
        if transport.get_write_buffer_size() or not hasattr(os, "readv"):
            return None
        try:
            descriptor = os.dup(transport.get_extra_info("socket").fileno())
        except OSError:  # there are too many
            return None
        transport.pause_reading()
        return descriptor

    def receive(self, call: PlainCall, at: int, count: Callable[[int], None]) -> None:
        """See ``plain_call.Connection``."""
        self._let_receive(Reader(self._own, call.room, at, count, call.ended))

    def hand_over(self, call: PlainCall, body: memoryview) -> None:
        """See ``plain_call.Connection``."""
        del self._exchanges[call]
        self.cycle = None  # type: ignore[assignment]
        now, self.parser = self.parser, call.parser  # the one that knows the request
        self._enter(Exchange(self._own, body))
        self.parser, self.cycle.more_body = now, False

    def refuse(self, status: int, detail: str) -> None:
        """See ``plain_call.Connection``."""
        self._parted = False  # its reader may have stopped already
        self._refuse(status, detail)
