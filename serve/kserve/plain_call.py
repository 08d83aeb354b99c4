"""One inference request with a plain tensor, as a connection answers it: see `direct`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.batching import Outcome
from fdconv_deploy.serve.errors import REQUEST_ID, RefusedError, response_to
from fdconv_deploy.serve.kserve.inference import InferRequest, together
from fdconv_deploy.serve.kserve.rest import HEADER_LENGTH, read_request, write_answer
from fdconv_deploy.serve.middleware import SECURITY, accepted_id, record
from fdconv_deploy.serve.model_versions import Model, Version
from fdconv_deploy.serve.request_body import aligned_room
from fdconv_deploy.serve.service import Service, noted
from starlette.datastructures import Headers
from starlette.requests import Request

NAMED_LENGTH = HEADER_LENGTH.lower().encode()
_LOGITS, _BINARY = ("logits",), {"": True}
_EMPTY = memoryview(b"")
_SECURITY = b"".join(name + b": " + value + b"\r\n" for name, value in SECURITY)
_NAMED_ID = REQUEST_ID.lower().encode()
_OK = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n%b: %%d\r\n"
    b"content-length: %%d\r\n%b: %%b\r\n%b" % (NAMED_LENGTH, _NAMED_ID, _SECURITY)
)


class Connection(Protocol):
    """The side of the connection's protocol that :class:`PlainCall` speaks to."""

    loop: asyncio.AbstractEventLoop
    scope: Any
    url: bytes
    headers: list[tuple[bytes, bytes]]
    parser: Any
    client: tuple[str, int] | None

    def answer(self, call: PlainCall, head: bytes, parts: list[Any]) -> None:
        """Write an answer, if anybody still waits for it.

        :param head: the status line and headers, all but those of every answer here.
        :param parts: the body, in parts.
        """

    def head(self, lines: bytes, *, last: bool) -> bytes:
        """An answer's status line and headers, to which those of every answer are added."""

    def is_last(self, call: PlainCall) -> bool:
        """Whether the connection is to end with this answer."""

    def receive(self, call: PlainCall, at: int, count: Callable[[int], None]) -> None:
        """Receive into the call's room, of which ``at`` bytes are filled."""

    def take_back(self) -> None:
        """Look for the next request: the body of this one is complete."""

    def lend_socket(self) -> int | None:
        """A descriptor of the connection's socket, which is left alone until it is told more.

        None where bytes on it are not the body's own, or wait to be written.
        """

    def sent(self, call: PlainCall, rest: list[memoryview], *, last: bool) -> None:
        """Note that an answer is written but for ``rest``, and write that."""

    def hang_up(self) -> None:
        """Close the connection without an answer."""

    def hand_over(self, call: PlainCall, body: memoryview) -> None:
        """Let ASGI answer the request, whose body is this."""

    def refuse(self, status: int, detail: str) -> None:
        """Answer that it will not be answered, and end the connection."""


class _NoEvent:
    """What uvicorn tells of a cycle's fate, and nobody waits for."""

    def set(self) -> None:
        """Do nothing."""


class PlainCall:
    """One request, from its headers to its answer, run by way of the queue.

    To uvicorn's protocol it is the cycle, of which it has all that is looked at.

    :param size: of the body, of which the first ``told`` bytes are JSON.
    """

    response_started = response_complete = disconnected = waiting_for_100_continue = False
    keep_alive = more_body = True
    message_event = _NoEvent()

    def __init__(
        self,
        connection: Connection,
        service: Service,
        client: str,
        model: Model,
        version: Version,
        route: str,
        headers: dict[bytes, bytes],
        size: int,
        told: int,
    ) -> None:
        self._start = time.perf_counter()
        self.parser = connection.parser
        self.room = aligned_room(size, told)
        self._connection, self._service, self._client = connection, service, client
        self._version, self._route = version, route
        self._at, self._told = 0, told
        self._taken = self._admitted = 0
        self._request: InferRequest | None = None
        self._withdraw: Callable[[], None] | None = None
        self._over = False
        given = headers.get(_NAMED_ID, b"").decode("latin-1")
        self._state: dict[str, Any] = {"request_id": accepted_id(given), "client": client}
        self._raw_path, self._headers = connection.url, connection.headers
        # From now on: a version that is replaced while the body comes still answers it.
        service.repository.hold(model, version)

    @property
    def state(self) -> dict[str, Any]:
        """Its id, and what is noted of it."""
        return self._state

    @property
    def wanting(self) -> bool:
        """Whether more of the body is to come, and wanted."""
        return self.more_body and not self._over

    def add(self, body: bytes) -> None:
        """A part of the body, by way of the parser."""
        if self._over:
            return
        try:
            self.count(len(body))
        except RefusedError as error:
            self.ended(error)
            return
        self.room[self._at : self._at + len(body)] = body
        self._at += len(body)

    def count(self, size: int) -> None:
        """Count bytes in.

        :raises RefusedError: there are too many in hand.
        """
        self._service.budget.take(size)
        self._taken += size

    def ended(self, error: Exception | None) -> None:
        """The body is complete, or ``error`` ended it."""
        if self._over:
            return
        self.more_body = False
        if error is None and not self.disconnected:
            self._run()
        elif isinstance(error, RefusedError):
            self._end()
            self._connection.refuse(error.status, error.detail)
            self._record(error.status)
        else:
            self.lost()

    def lost(self) -> None:
        """The client has gone."""
        if not self._over:
            self._end()
            self._record(499)

    def receive(self) -> None:
        """Receive the rest of the body."""
        self._connection.receive(self, self._at, self.count)

    def _plain_request(self, body: memoryview) -> InferRequest | None:
        """The request in a complete body, if it is one for here."""
        try:
            request, binary = read_request(
                body, self._told, self._version.card, self._service.settings.max_images
            )
        except RefusedError:
            return None
        if (
            request.outputs != _LOGITS
            or not binary.get("logits", binary[""])
            or request.images.dtype != np.float32
        ):
            return None
        return request

    def _run(self) -> None:
        """Run the complete body by way of the queue."""
        service, version, admission = self._service, self._version, self._service.admission
        request = self._plain_request(self.room)
        count = 0 if request is None else len(request.images)
        if request is None or not admission.has_room(self._client, count):
            self._hand_over()
            return
        self._request, self._admitted = request, count
        admission.take(self._client, count)
        deadline = service.deadline(request.timeout_ms)
        self._withdraw = service.scheduler.submit(version, request.images, deadline, self._done)

    def _hand_over(self) -> None:
        room = self.room
        self._end()
        self._connection.hand_over(self, room)

    def _done(self, found: Outcome | Exception) -> None:
        self._withdraw = None
        try:
            status, head, parts = self._answer(found)
        except Exception as error:
            status, head, parts = self._problem(error)
        self._connection.answer(self, head, parts)
        self._end()
        self._record(status)

    def _answer(self, found: Outcome | Exception) -> tuple[int, bytes, list[Any]]:
        """Status, head and body."""
        if isinstance(found, Exception):
            raise found
        request = self._request
        assert request is not None
        logits = together(found.rows)
        text = self._described(request, logits)
        stages = [("queue", found.queue_seconds), ("inference", found.run_seconds)]
        noted(self._state, self._version.name, len(request.images), stages)
        size = len(text) + logits.nbytes
        return 200, self._head(len(text), size), [text, logits.data.cast("B")]

    def _described(self, request: InferRequest, logits: npt.NDArray[np.float32]) -> bytes:
        """The answer's JSON."""
        version = self._version
        outputs: dict[str, Any] = {"logits": logits}
        parts, _ = write_answer(version.name, version.card.version, request, outputs, _BINARY)
        return bytes(parts[0])

    def _head(self, told: int, size: int) -> bytes:
        return _OK % (told, size, self._state["request_id"].encode())

    def _problem(self, error: Exception) -> tuple[int, bytes, list[Any]]:
        path = self._raw_path.decode()
        scope = {**self._connection.scope, "path": path, "query_string": b"", "state": self._state}
        response = response_to(Request(scope), error)
        status = response.status_code
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()]
        lines += [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        return status, b"".join([*lines, _SECURITY]), [bytes(response.body)]

    def _give_back(self) -> None:
        """Give back what others wait for."""
        self._over = True
        if self._withdraw is not None:
            self._withdraw()
            self._withdraw = None
        self._service.admission.give(self._client, self._admitted)
        self._service.budget.give(self._taken)
        self._admitted = self._taken = 0

    def _end(self) -> None:
        """Give everything back. The connection keeps this object until its next request."""
        self._give_back()
        self._service.repository.release(self._version)
        self.room, self._request = _EMPTY, None

    def _record(self, status: int, seconds: float | None = None) -> None:
        record(
            self._service,
            self._state,
            method="POST",
            path=self._raw_path,
            route=self._route,
            headers=Headers(raw=self._headers),
            status=status,
            seconds=time.perf_counter() - self._start if seconds is None else seconds,
        )
