"""Inference requests that the connection answers by itself, without ASGI.

A binary tensor in and the logits in binary out is what costs least to decode and encode, so for
it the way to the model weighs most. On that way, every layer runs on caches that the last
inference has emptied: what takes 20 microseconds in a loop takes 100 here. So this is the route of
`serve.routes.kserve` over again for its one plain case, with the same parts and no layers: a
request that may not be answered, or that needs anything more, goes the general way, before its
body is read or with the body read.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from starlette.datastructures import Headers
from starlette.requests import Request

from serve.bodies import LARGE, aligned_room
from serve.middleware import SECURITY, accepted_id, record
from serve.problems import REQUEST_ID, RefusedError, response_to
from serve.scheduling import DeadlineError, Outcome
from serve.security import Keys
from serve.service import Service, noted
from serve.versions import Model, Version

from .at_once import AtOnce, Gone, NotPlain, NotPlainError, Result, Sent, Slow
from .inference import InferRequest, together
from .rest import HEADER_LENGTH, SMALL_JSON, read_request, write_answer

_ADDRESS = re.compile(rb"/v2/models/([A-Za-z0-9._-]+)(/versions/([A-Za-z0-9._-]+))?/infer")
_ROUTES = "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"
# Headers of requests that take more than the plain way.
_OTHERWISE = (b"transfer-encoding", b"content-encoding", b"expect", b"upgrade")
_LOGITS, _BINARY = ("logits",), {"": True}
# Requests' JSON of which a version remembers its answers' JSON: clients repeat themselves.
_MOST_ANSWERS = 64
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

    loop: asyncio.AbstractEventLoop
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

    def head(self, lines: bytes, *, last: bool) -> bytes:
        """An answer's status line and headers, to which those of every answer are added."""

    def is_last(self, call: DirectCall) -> bool:
        """Whether the connection is to end with this answer."""

    def receive(self, call: DirectCall, at: int, count: Callable[[int], None]) -> None:
        """Receive into the call's room, of which ``at`` bytes are filled."""

    def receive_no_more(self, call: DirectCall) -> None:
        """Look for the next request: the call's is complete, or answered."""

    def lend_socket(self) -> int | None:
        """A descriptor of the connection's socket, which is left alone until it is told more.

        None where bytes on it are not the body's own, or wait to be written.
        """

    def sent(self, call: DirectCall, rest: list[memoryview], *, last: bool) -> None:
        """Note that an answer is written but for ``rest``, and write that."""

    def hang_up(self) -> None:
        """Close the connection without an answer."""

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


class _NoEvent:
    """What uvicorn tells of a cycle's fate, and nobody waits for."""

    def set(self) -> None:
        """Do nothing."""


class DirectCall:
    """One request, from its headers to its answer; to uvicorn's protocol, its cycle.

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
        self._entered = 0.0
        self._at_once: AtOnce | None = None
        self._late: asyncio.TimerHandle | None = None
        given = headers.get(_NAMED_ID, b"").decode("latin-1")
        self._state: dict[str, Any] = {"request_id": accepted_id(given), "client": client}
        self._raw_path, self._headers = connection.url, connection.headers
        # From now on: a version that is replaced while the body comes still answers it.
        service.repository.hold(model, version)

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
        else:
            self.lost()

    def lost(self) -> None:
        """The client has gone."""
        if not self.settle() and not self._over:
            self._end()
            self._record(499)

    def receive(self) -> None:
        """Receive the rest of the body."""
        service, rest = self._service, len(self.room) - self._at
        # At once goes what one run answers, while nothing else could run.
        if len(self.room) - self._told == self._version.image_bytes and service.scheduler.idle:
            descriptor = self._connection.lend_socket()
            if descriptor is not None:
                try:
                    self.count(rest)
                except RefusedError as error:
                    self.ended(error)
                    return
                self._enter_at_once(descriptor)
                return
        self._connection.receive(self, self._at, self.count)

    def _enter_at_once(self, descriptor: int) -> None:
        service, version = self._service, self._version
        service.admission.take(self._client, 1)
        self._admitted = 1
        self._at_once = AtOnce(descriptor, self.room, self._at, self._answer_body)
        self._late = self._connection.loop.call_later(
            service.settings.deadline_ms / 1e3, self._is_late
        )
        self._entered = time.perf_counter()
        self._withdraw = service.scheduler.submit_call(
            version, self._at_once, float("inf"), self._worked
        )

    def claim(self) -> bool:
        """Whether the event loop may answer: an inference thread is not doing so."""
        return self._at_once is None or self._at_once.claim()

    def _is_late(self) -> None:
        if self.claim():
            self._body_is_read()
            self._done(DeadlineError())

    def _answer_body(self, body: memoryview) -> tuple[list[Any], bool, float]:
        """On the inference thread; see ``AtOnce``."""
        version, told = self._version, self._told
        asked = bytes(body[:told])
        text = version.answers.get(asked)
        request: InferRequest | None = None
        if text is None:
            request = self._plain_request(body)
            if request is None or request.timeout_ms is not None:
                raise NotPlainError
            images = request.images
        else:
            images = np.frombuffer(body[told:], np.float32).reshape(
                1, 3, *version.session.input_size
            )
        # While the network runs, the event loop gets ready for what comes next.
        self._connection.loop.call_soon_threadsafe(self._body_is_read)
        start = time.perf_counter()
        logits = version.session.run(images)
        seconds = time.perf_counter() - start
        if text is None:
            assert request is not None
            text = self._described(request, logits)
            if not request.id and len(version.answers) < _MOST_ANSWERS:
                version.answers[asked] = text
        last = self._connection.is_last(self)
        head = self._connection.head(self._head(len(text), len(text) + logits.nbytes), last=last)
        return [head + text, logits], last, seconds

    def _body_is_read(self) -> None:
        if not self._over and self.more_body:
            self._connection.receive_no_more(self)

    def settle(self) -> bool:
        """Note the answer, where an inference thread has sent it and not said so yet.

        No more of it than the next request must find done: that one has come already.
        """
        sent = self._at_once.sent if self._at_once is not None else None
        if self._over or sent is None or not sent.unhurried:
            return False
        self._give_back()
        self.response_started = self.response_complete = True
        self._service.later(self._answered, sent, time.perf_counter())
        return True

    def _answered(self, sent: Sent, at: float) -> None:
        waited = max(sent.begun - self._entered, 0.0)
        stages = [("queue", waited), ("inference", sent.run_seconds)]
        noted(self._state, self._version.name, 1, stages)
        self._service.count_batch(self._version, 1, sent.run_seconds)
        self._end()
        self._record(200, at - self._start)

    def _worked(self, found: Outcome | Exception) -> None:
        """What became of it at once."""
        self._withdraw = None
        if isinstance(found, Exception):
            if self.claim():
                self._body_is_read()
                self._done(found)
            else:  # while it sent the answer
                self._connection.hang_up()
                self.lost()
            return
        result: Result = found.rows[0]
        if isinstance(result, Slow):
            self._not_at_once()
            self._connection.receive(self, result.at, lambda _: None)
        elif isinstance(result, NotPlain):
            self._not_at_once()
            self._body_is_read()
            self._run()
        elif isinstance(result, Gone):
            self._connection.hang_up()
            self.lost()
        elif isinstance(result, Sent):
            self._body_is_read()
            self._connection.sent(self, result.rest, last=result.last)
            self._give_back()
            self._service.later(self._answered, result, time.perf_counter())

    def _not_at_once(self) -> None:
        self._service.admission.give(self._client, self._admitted)
        self._admitted = 0
        if self._late is not None:
            self._late.cancel()
        self._late = self._at_once = None

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
        if self._late is not None:
            self._late.cancel()
        if self._at_once is not None:
            self._at_once.forget()
        self._service.repository.release(self._version)
        self.room, self._request = _EMPTY, None
        self._at_once = self._late = None

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
