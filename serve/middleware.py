"""Around every request: who asks, its id, the API key, the access log, the counters."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fdconv_deploy.serve.errors import (
    MEDIA_TYPE,
    REQUEST_ID,
    RefusedError,
    problem,
    problem_response,
)
from fdconv_deploy.serve.kserve.tensors import HEADER_LENGTH
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.settings import Settings
from fdconv_deploy.serve.telemetry import log_access, milliseconds

MAX_HEADERS, MAX_HEADER_BYTES, MAX_URL_BYTES = 100, 32 << 10, 8 << 10
_REQUEST_ID = REQUEST_ID.lower().encode()
# What a client may choose: short, and of nothing that could break a log line or a header.
_ACCEPTED = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Asked every few seconds by machines, which would end a service that does not answer.
HEALTH = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
# Open to all beside them: the page, which holds no data and asks for a key.
_OPEN = {*HEALTH, "/", "/docs", "/openapi.json"}
_OPEN_FOLDERS = ("/static/", "/samples")
_PROBED = {*HEALTH, "/metrics"}
# What scripts of other origins may read of an answer's headers beside the few that all may.
EXPOSED = (
    REQUEST_ID, "Retry-After", "Server-Timing", "X-Fit", "X-Mode", "X-Model", HEADER_LENGTH,
)  # fmt: skip
SECURITY = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_FORWARDED = "x-forwarded-for"
_PROXIES = 32  # in a row; there is no end to what a client may have put before them
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Client(NamedTuple):
    """A client, over HTTP and gRPC, for limits, logs and metrics."""

    address: str
    key: str  # the short name of its API key, empty without a valid one

    @property
    def name(self) -> str:
        """What its share is counted by: the key, which may come from many addresses, if any."""
        return self.key or self.address


class Clients:
    """Identifies clients. Of keys, only hashes are compared and kept."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [_digest(key.get_secret_value()) for key in settings.api_keys]
        self._proxies = settings.trusted_proxies

    def identify(self, peer: str, headers: Sequence[tuple[str, str]]) -> Client:
        """Identify the sender of a request by its peer's address and its headers, or metadata.

        Their names are in lower case; the address may be any text of a server that has none.
        """
        address = _normalized(peer)
        if self._proxies:
            address = self._forwarded(address, headers)
        return Client(address, self._key(headers) if self._digests else "")

    def check(self, client: Client) -> None:
        """Refuse a client without a key by a 401, where there are keys."""
        if self._digests and not client.key:
            raise RefusedError(
                401,
                "This service asks for an API key. Send it as 'Authorization: Bearer KEY' or "
                "'X-API-Key: KEY'.",
                {"WWW-Authenticate": "Bearer"},
            )

    def _forwarded(self, address: str, headers: Sequence[tuple[str, str]]) -> str:
        """The last address that a trusted proxy vouches for.

        Each proxy appends whom it was asked by; what stands before the last address that is no
        trusted proxy's may be invented.
        """
        given = ",".join(value for name, value in headers if name == _FORWARDED)
        chain = given.rsplit(",", _PROXIES)[-_PROXIES:]
        while chain and self._trusts(address):
            before = _without_port(chain.pop().strip())
            if _parsed(before) is None:
                break
            address = _normalized(before)
        return address

    def _trusts(self, address: str) -> bool:
        found = _parsed(address)
        return found is not None and any(found in network for network in self._proxies)

    def _key(self, headers: Sequence[tuple[str, str]]) -> str:
        given = dict(reversed(headers))  # of several, the first counts
        scheme, _, token = given.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else given.get("x-api-key", "")
        found = _digest(key)
        # Every key is compared, each in constant time.
        known = sum(hmac.compare_digest(found, digest) for digest in self._digests)
        return f"key-{found[:12]}" if key and known else ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _parsed(text: str) -> Address | None:
    """An address; IPv4 where a socket of IPv6 gave it in IPv6's form. None of other text."""
    return _parsed_once(text) if len(text) < 80 else None


@lru_cache(maxsize=4096)
def _parsed_once(text: str) -> Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


@lru_cache(maxsize=4096)
def _normalized(text: str) -> str:
    """An address in its one spelling; other text as it is."""
    return str(_parsed(text) or text)


def _without_port(text: str) -> str:
    """The address of ``1.2.3.4:80`` and ``[::1]:80``, as some proxies write them."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def accepted_id(given: str) -> str:
    """The request's id: the client's own, or a new one where that is none."""
    return given if _ACCEPTED.fullmatch(given) else os.urandom(16).hex()


class Edge:
    """The outermost layer of the application, where it is known who asks, and who may."""

    def __init__(self, app: ASGIApp, service: Service, clients: Clients) -> None:
        self.app, self._service, self._clients = app, service, clients
        self._begun = False  # a request, in this pass of the event loop
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, headers, method = time.perf_counter(), Headers(scope=scope), scope["method"]
        request_id = accepted_id(headers.get(REQUEST_ID, ""))
        scope.setdefault("state", {})["request_id"] = request_id
        named = (_REQUEST_ID, request_id.encode())
        scope, path = self._below_prefix(scope)
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Answers to unforeseen errors carry it already.
                kept = [pair for pair in message.get("headers", ()) if pair[0] != _REQUEST_ID]
                message["headers"] = [*kept, named, *SECURITY]
                if self._service.draining:
                    message["headers"].append((b"connection", b"close"))
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        if method == "HEAD":  # as GET, of which it wants the head: FastAPI's routes do not
            scope["method"] = "GET"
        try:
            if path not in HEALTH:
                await self._turn()
            app = self._refusal(scope, path, headers) or self.app
            await app(scope, receive, send_named)
            await asyncio.sleep(0)  # uvloop writes when its callbacks are done: the answer first
        except asyncio.CancelledError:
            if status or not self._service.draining:
                status = status or 499  # Ray's proxy cancels what its client has left
                raise
            # The server's last word to what is not done by the end of drain_seconds.
            detail = "The service stopped before it could answer. Send the request again."
            stopped = RefusedError(503, detail, {"Retry-After": "1"})
            await problem_response(Request(scope), stopped)(scope, receive, send_named)
        finally:
            self._record(scope, method, path, headers, status, time.perf_counter() - start)

    async def _turn(self) -> None:
        """Begin one request in each pass of the event loop: health waits for one, not for all."""
        loop = asyncio.get_running_loop()
        if self._begun:
            self._waiting.append(loop.create_future())
            await self._waiting[-1]
        else:
            self._begun = True
            loop.call_soon(self._next)

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._next)
                return
        self._begun = False

    def _below_prefix(self, scope: Scope) -> tuple[Scope, str]:
        """The scope with ASGI's ``root_path`` and whole ``path``, and the path below it.

        A proxy may take the prefix off, or leave it there. A server's own comes before the setting.
        """
        root = scope.get("root_path", "").rstrip("/") or self._service.settings.root_path
        path = scope["path"]
        if path == root or path.startswith(f"{root}/"):
            path = path[len(root) :]
        return {**scope, "root_path": root, "path": root + path}, path

    def _refusal(self, scope: Scope, path: str, headers: Headers) -> ASGIApp | None:
        """The answer to what is refused at the door, or to the page without its slash."""
        client = self._clients.identify((scope.get("client") or ("",))[0], headers.items())
        scope["state"]["client"], scope["state"]["key"] = client.name, client.key
        if not path:  # the page's own addresses are relative to the slash
            return RedirectResponse(f"{scope['root_path']}/")
        try:
            self._check_head(scope, headers)
            most = self._service.settings.max_connections
            if path not in HEALTH and len(scope["state"].get("connections", ())) > most:
                raise RefusedError(
                    503,
                    f"The service has {most} connections open, all it takes. Try again in a "
                    "moment.",
                    {**self._service.admission.retry_after(), "Connection": "close"},
                )
            if path not in _OPEN and not path.startswith(_OPEN_FOLDERS):
                self._clients.check(client)
        except RefusedError as error:
            return problem_response(Request(scope), error)
        return None

    def _check_head(self, scope: Scope, headers: Headers) -> None:
        # Where a proxy in front reads one and a server the other, a request can hide in a body.
        if "transfer-encoding" in headers and "content-length" in headers:
            raise RefusedError(
                400,
                "This is not a valid HTTP/1.1 request: it has both Content-Length and "
                "Transfer-Encoding. Send one of them.",
                {"Connection": "close"},
            )
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
            raise RefusedError(
                414, f"The address is longer than {MAX_URL_BYTES:,} bytes. Send a shorter one."
            )
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise RefusedError(
                431,
                f"The request has more than {MAX_HEADERS} headers, or more than "
                f"{MAX_HEADER_BYTES:,} bytes of them. Send fewer.",
            )

    def _record(
        self, scope: Scope, method: str, path: str, headers: Headers, status: int, seconds: float
    ) -> None:
        """Count an answered request, trace it, and write it to the access log."""
        service, state = self._service, scope["state"]
        route = getattr(scope.get("route"), "path", "unmatched")
        facts, stages = state.get("facts", {}), state.get("stages", ())
        status = state.get("refused", status)
        later, counted = service.metrics.later, (route, str(status), seconds, state.get("key", ""))
        later(service.metrics.answered, *counted)
        if facts:
            facts["timings_ms"] = milliseconds(stages)
            later(service.count, facts["model"], stages, facts["images"])
        if path not in _PROBED:
            attributes = {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "fdconv.request_id": state["request_id"],
                **({"fdconv.model": facts["model"]} if facts else {}),
            }
            service.tracing.record(
                f"{method} {route}", headers, seconds, stages, attributes, failed=status >= 500
            )
        log_access(
            probe=path in _PROBED and status < 400,
            request_id=state["request_id"],
            client=state.get("client", ""),
            method=method,
            # As sent, in ASCII: decoded, it could hold a line break.
            path=scope.get("raw_path", b"").decode("ascii", "replace")[:400],
            status=status,
            ms=round(seconds * 1e3, 3),
            **facts,
        )


def refuse(
    service: Service, clients: Clients, peer: str, status: int, detail: str, scope: Scope | None
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an answer that the server gives instead of the application.

    It is counted and logged once: by :class:`Edge`, where the request got as far as that.
    """
    if scope is not None and "request_id" in scope["state"]:
        request_id = scope["state"]["request_id"]
        scope["state"]["refused"] = status
    else:
        request_id = accepted_id("")
        service.metrics.requests.labels("unmatched", str(status)).inc()
        client = clients.identify(peer, ())  # there may be no headers that can be read
        log_access(request_id=request_id, client=client.name, status=status)
    body = json.dumps(problem(request_id, status, detail, kserve=True)).encode()
    kind = (b"content-type", MEDIA_TYPE.encode())
    return [kind, (_REQUEST_ID, request_id.encode()), *SECURITY], body
