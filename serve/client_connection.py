"""What the protocol lends the application beyond ASGI, for one request at a time.

A large body is received where it will be used. By way of the HTTP parser and ASGI every byte
of it would be copied four times, in pieces, each with a turn of the event loop of its own: for
a tensor of half a megabyte that costs more than all the rest of a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Scope

_EXTENSION = "fdconv.exchange"
_PIECE = 32 << 10


class Connection(Protocol):
    """The side of the connection's protocol that :class:`Exchange` speaks to."""

    def take_received(self, exchange: Exchange) -> tuple[bytes | bytearray, bool]:
        """What has come of the body and nobody has read, and whether more is to come.

        :raises ClientDisconnect: nothing more will.
        """

    def lend(self, reader: Reader) -> None:
        """Let ``reader`` receive."""

    def take_back(self) -> None:
        """Receive again: the body is complete."""

    def stop_receiving(self) -> None:
        """Look at nothing more of the body; the answer to come closes the connection."""

    def hang_up(self) -> None:
        """Close the connection: nobody waits for the body any more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""

    def pause_writing(self) -> None:
        """See ``asyncio.Protocol``."""

    def resume_writing(self) -> None:
        """See ``asyncio.Protocol``."""


class Exchange:
    """One request and its answer, as the connection sees them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._on_lost: Callable[[], None] | None = None
        self._lost = False

    def offer(self, scope: Scope) -> None:
        """Let the application find it."""
        scope.setdefault("extensions", {})[_EXTENSION] = self

    async def receive_into(self, room: memoryview, count: Callable[[int], None]) -> None:
        """Receive the whole body into ``room``, which is exactly as long.

        :param count: told of bytes as they come; what it raises ends the receiving and is
            raised here.
        :raises ClientDisconnect: the client went away first.
        """
        received, more = self._connection.take_received(self)
        at = len(received)
        room[:at] = received
        count(at)
        if more:
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._connection.lend(
                Reader(self._connection, room, at, count, lambda error: _settle(over, error))
            )
            try:
                await over
            except asyncio.CancelledError:
                self._connection.hang_up()
                raise

    def watch(self, on_lost: Callable[[], None] | None) -> None:
        """Have ``on_lost`` called when the client goes away; at once, if it has gone."""
        self._on_lost = on_lost
        if self._lost and on_lost is not None:
            on_lost()

    def lost(self) -> None:
        """The client has gone."""
        self._lost = True
        if self._on_lost is not None:
            self._on_lost()


class Front(asyncio.BufferedProtocol):
    """Receives for a connection's protocol in small pieces, and passes them and all else on.

    What is received of a body beyond its headers is copied twice to where it is used, so it is to
    be little; by itself the event loop receives up to 256 KiB at a time.
    """

    def __init__(self, protocol: asyncio.Protocol) -> None:
        # A view: TLS fills slices of it, which of a bytearray would be copies, and lost.
        self._protocol, self._room = protocol, memoryview(bytearray(_PIECE))
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> memoryview:
        """See ``asyncio.BufferedProtocol``."""
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        """See ``asyncio.BufferedProtocol``."""
        self._protocol.data_received(bytes(self._room[:nbytes]))


class Reader(asyncio.BufferedProtocol):
    """Receives the rest of one body.

    :param room: the whole body's place, of which ``at`` bytes are filled.
    :param done: told once, None when the body is complete, else what ended the receiving.
    """

    def __init__(
        self,
        connection: Connection,
        room: memoryview,
        at: int,
        count: Callable[[int], None],
        done: Callable[[Exception | None], None],
    ) -> None:
        self._connection, self._room, self._at, self._count = connection, room, at, count
        self._done, self._over = done, False

    def get_buffer(self, sizehint: int) -> memoryview:
        """See ``asyncio.BufferedProtocol``; never more than the body's, so no byte too many."""
        return self._room[self._at :]

    def buffer_updated(self, nbytes: int) -> None:
        """See ``asyncio.BufferedProtocol``."""
        self._at += nbytes
        try:
            self._count(nbytes)
        except Exception as error:
            self._connection.stop_receiving()
            self._end(error)
            return
        if self._at == len(self._room):
            self._connection.take_back()
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.BaseProtocol``."""
        self._end(ClientDisconnect())
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """See ``asyncio.BaseProtocol``."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """See ``asyncio.BaseProtocol``."""
        self._connection.resume_writing()

    def _end(self, error: Exception | None) -> None:
        if not self._over:
            self._over = True
            self._done(error)


def _settle(over: asyncio.Future[None], error: Exception | None) -> None:
    if over.done():
        return
    if error is None:
        over.set_result(None)
    else:
        over.set_exception(error)


def exchange_of(scope: Scope) -> Exchange | None:
    """The request's exchange; None behind another server than this package's."""
    found: Exchange | None = scope.get("extensions", {}).get(_EXTENSION)
    return found
