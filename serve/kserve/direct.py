"""Inference requests that the connection answers by itself, without ASGI.

A binary tensor in and the logits in binary out is what costs least to decode and encode, so for
it the way to the model weighs most. On that way, every layer runs on caches that the last
inference has emptied: what takes 20 microseconds in a loop takes 100 here. So this is the route of
`routes.kserve` over again for its one plain case, with the same parts and no layers: a
request that may not be answered, or that needs anything more, goes the general way, before its
body is read or with the body read.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import numpy as np
from fdconv_deploy.serve.batching import DeadlineError, Outcome
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.kserve.at_once import AtOnce, Gone, NotPlain, Result, Sent, Slow
from fdconv_deploy.serve.kserve.inference import InferRequest
from fdconv_deploy.serve.kserve.plain_call import NAMED_LENGTH, Connection, PlainCall
from fdconv_deploy.serve.kserve.rest import SMALL_JSON
from fdconv_deploy.serve.request_body import LARGE
from fdconv_deploy.serve.security import Keys
from fdconv_deploy.serve.service import Service, noted

_ADDRESS = re.compile(rb"/v2/models/([A-Za-z0-9._-]+)(/versions/([A-Za-z0-9._-]+))?/infer")
_ROUTES = "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"
# Headers of requests that take more than the plain way.
_OTHERWISE = (b"transfer-encoding", b"content-encoding", b"expect", b"upgrade")
# Requests' JSON of which a version remembers its answers' JSON: clients repeat themselves.
_MOST_ANSWERS = 64


def direct_call(connection: Connection, service: Service, keys: Keys) -> DirectCall | None:
    """The request whose headers have come; None where it is not to be answered directly.

    The caller has made sure that it is a POST in HTTP/1.1, on a connection that is kept alive
    and has nothing else under way.
    """
    address = _ADDRESS.fullmatch(connection.url)
    if address is None:
        return None
    headers = dict(connection.headers)
    size, told = headers.get(b"content-length", b""), headers.get(NAMED_LENGTH)
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


class DirectCall(PlainCall):
    """One request, which an inference thread may take on by itself: see `at_once`."""

    _at_once: AtOnce | None = None
    _late: asyncio.TimerHandle | None = None
    _entered = 0.0

    def lost(self) -> None:
        """The client has gone."""
        if not self.settle():
            super().lost()

    def receive(self) -> None:
        """Receive the rest of the body."""
        # At once goes what one run answers, while nothing else could run.
        one = len(self.room) - self._told == self._version.image_bytes
        if not one or not self._service.scheduler.idle:
            super().receive()
            return
        try:
            self.count(len(self.room) - self._at)
        except RefusedError as error:
            self.ended(error)
            return
        descriptor = self._connection.lend_socket()
        if descriptor is None:
            self._connection.receive(self, self._at, _counted)
        else:
            self._enter_at_once(descriptor)

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
            # While its body is still being read, what follows the answer cannot be told.
            self.keep_alive = not self.more_body
            self._done(DeadlineError())

    def _answer_body(self, body: memoryview) -> tuple[list[Any], bool, float] | None:
        """On the inference thread; see ``AtOnce``."""
        version, told = self._version, self._told
        asked = bytes(body[:told])
        text = version.answers.get(asked)
        request: InferRequest | None = None
        if text is None:
            request = self._plain_request(body)
            if request is None or request.timeout_ms is not None:
                return None
            images = request.images
        else:
            images = np.frombuffer(body[told:], np.float32).reshape(
                1, version.session.channels, *version.session.input_size
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
            self._connection.take_back()

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
                self.keep_alive = not self.more_body
                self._done(found)
            else:  # while it sent the answer
                self._connection.hang_up()
                self.lost()
            return
        result: Result = found.rows[0]
        if isinstance(result, Slow):
            self._not_at_once()
            self._connection.receive(self, result.at, _counted)
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

    def _end(self) -> None:
        if self._late is not None:
            self._late.cancel()
        if self._at_once is not None:
            self._at_once.forget()
        self._at_once = self._late = None
        super()._end()


def _counted(size: int) -> None:
    """Bytes that have been counted in already."""
