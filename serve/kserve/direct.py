"""Inference requests that the connection answers by itself, without ASGI.

A binary tensor in and the logits in binary out is what costs least to decode and encode, so for
it the way to the model weighs most. On that way, every layer runs on caches that the last
inference has emptied: what takes 20 microseconds in a loop takes 100 here. So this is the route of
`serve.routes.kserve` over again for its one plain case, with the same parts and no layers: a
request that may not be answered, or that needs anything more, goes the general way, before its
body is read or with the body read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

import numpy as np
from starlette.datastructures import Headers
from starlette.requests import Request

from serve.bodies import LARGE, aligned_room
from serve.middleware import SECURITY, accepted_id, record
from serve.problems import REQUEST_ID, RefusedError, response_to
from serve.scheduling import Outcome
from serve.security import Keys
from serve.service import Service, noted
from serve.versions import Model, Version

from .inference import InferRequest, together
from .rest import HEADER_LENGTH, SMALL_JSON, read_request, write_answer

_ADDRESS = re.compile(rb"/v2/models/([A-Za-z0-9._-]+)(/versions/([A-Za-z0-9._-]+))?/infer")
_ROUTES = "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"
# Headers of requests that take more than the plain way.
_OTHERWISE = (b"transfer-encoding", b"content-encoding", b"expect", b"upgrade")
_LOGITS = ("logits",)
_EMPTY = memoryview(b"")
_SECURITY = b"".join(name + b": " + value + b"\r\n" for name, value in SECURITY)
_NAMED_ID = REQUEST_ID.lower().encode()
_NAMED_LENGTH = HEADER_LENGTH.lower().encode()
_OK = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n%b: %%d\r\n"
    b"content-length: %%d\r\n%b: %%b\r\n%b" % (_NAMED_LENGTH, _NAMED_ID, _SECURITY)
)


class Connection(Protocol):
    """The side of the connection's protocol that :class:`DirectCall` speaks to."""

    scope: Any
    url: bytes
    headers: list[tuple[bytes, bytes]]
    parser: Any
    client: tuple[str, int] | None

    def answer(self, call: DirectCall, head: bytes, parts: list[Any]) -> None:
        """Write an answer, if anybody still waits for it.

        :param head: the status line and headers, all but those of every answer here.
        :param parts: the body, in parts.
        """

    def hand_over(self, call: DirectCall, body: memoryview) -> None:
        """Let ASGI answer the request, whose body is this."""

    def refuse(self, status: int, detail: str) -> None:
        """Answer that it will not be answered, and end the connection."""


def direct_call(connection: Connection, service: Service, keys: Keys) -> DirectCall | None:
    """The request whose headers have come; None where it is not to be answered directly.

    The caller has made sure that it is a POST in HTTP/1.1, on a connection that is kept alive
    and has nothing else under way.
    """
    address = _ADDRESS.fullmatch(connection.url)
    if address is None:
        return None
    headers = dict(connection.headers)
    size, told = headers.get(b"content-length", b""), headers.get(_NAMED_LENGTH)
    if (
        told is None
        or len(headers) != len(connection.headers)
        or any(name in headers for name in _OTHERWISE)
        or not (told.isdigit() and size.isdigit() and len(size) < 16 and len(told) < 16)
        or not LARGE <= int(size) <= service.settings.max_body_bytes
        or int(told) > min(int(size), SMALL_JSON)
    ):
        return None
    try:
        client = _client(connection, headers, keys)
        model = service.repository.get_version(address[1].decode(), (address[3] or b"").decode())
        service.check_loaded()
    except RefusedError:
        return None  # it is refused, with all that belongs to it, on the general way
    version = model.version
    if version is None or version.session.detects or not service.admission.has_room(client):
        return None
    route = _ROUTES[address[2] is not None]
    return DirectCall(
        connection, service, client, model, version, route, headers, int(size), int(told)
    )


def _client(connection: Connection, headers: dict[bytes, bytes], keys: Keys) -> str:
    if keys.needed:
        given = (
            headers.get(name, b"").decode("latin-1") for name in (b"authorization", b"x-api-key")
        )
        return keys.check(*given)
    return connection.client[0] if connection.client else ""


class DirectCall:
    """One request, from its headers to its answer; to uvicorn's protocol, its cycle.

    :param size: of the body, of which the first ``told`` bytes are JSON.
    """

    response_started = response_complete = disconnected = waiting_for_100_continue = False
    keep_alive = more_body = True

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
        self.message_event = self  # which uvicorn sets, and nobody waits for
        self.parser = connection.parser
        self.room = aligned_room(size, told)
        self._connection, self._service, self._client = connection, service, client
        self._version, self._route = version, route
        self._at, self._told = 0, told
        self._taken = self._admitted = 0
        self._binary: dict[str, bool] = {}
        self._request: InferRequest | None = None
        self._withdraw: Callable[[], None] | None = None
        self._over = False
        given = headers.get(_NAMED_ID, b"").decode("latin-1")
        self._state: dict[str, Any] = {"request_id": accepted_id(given), "client": client}
        self._raw_path, self._headers = connection.url, connection.headers
        # From now on: a version that is replaced while the body comes still answers it.
        service.repository.hold(model, version)

    def set(self) -> None:
        """As the event that uvicorn takes this for."""

    @property
    def wanting(self) -> int | None:
        """The bytes of the body that are there, while more are to come; else None."""
        return self._at if self.more_body and not self._over else None

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
        else:
            self.lost()

    def lost(self) -> None:
        """The client has gone."""
        if not self._over:
            self._end()
            self._record(499)

    def _run(self) -> None:
        service, version = self._service, self._version
        admission = service.admission
        try:
            request, self._binary = read_request(
                self.room, self._told, version.card, service.settings.max_images
            )
        except RefusedError:
            self._hand_over()
            return
        images, count = request.images, len(request.images)
        if (
            request.outputs != _LOGITS
            or not self._binary.get("logits", self._binary[""])
            or images.dtype != np.float32
            or not admission.has_room(self._client, count)
        ):
            self._hand_over()
            return
        self._request, self._admitted = request, count
        admission.take(self._client, count)
        deadline = service.deadline(request.timeout_ms)
        self._withdraw = service.scheduler.submit(version, images, deadline, self._done)

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
        version, request = self._version, self._request
        assert request is not None
        outputs = {"logits": together(found.rows)}
        parts, told = write_answer(
            version.name, version.card.version, request, outputs, self._binary
        )
        size = sum(len(part) for part in parts)
        stages = [("queue", found.queue_seconds), ("inference", found.run_seconds)]
        noted(self._state, version.name, len(request.images), stages)
        return 200, _OK % (told, size, self._state["request_id"].encode()), parts

    def _problem(self, error: Exception) -> tuple[int, bytes, list[Any]]:
        path = self._raw_path.decode()
        scope = {**self._connection.scope, "path": path, "query_string": b"", "state": self._state}
        response = response_to(Request(scope), error)
        status = response.status_code
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()]
        lines += [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        return status, b"".join([*lines, _SECURITY]), [bytes(response.body)]

    def _end(self) -> None:
        """Give everything back. The connection keeps this object until its next request."""
        self._over = True
        if self._withdraw is not None:
            self._withdraw()
        self._service.admission.give(self._client, self._admitted)
        self._service.budget.give(self._taken)
        self._service.repository.release(self._version)
        self.room, self._request, self._withdraw = _EMPTY, None, None

    def _record(self, status: int) -> None:
        record(
            self._service,
            self._state,
            method="POST",
            path=self._raw_path,
            route=self._route,
            headers=Headers(raw=self._headers),
            status=status,
            seconds=time.perf_counter() - self._start,
        )
