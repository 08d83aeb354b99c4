"""Around every request: its id, the API key, the access log, the counters, the clean-up."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from fdconv_deploy.serve.errors import REQUEST_ID, RefusedError, problem_response
from fdconv_deploy.serve.logging import log_access
from fdconv_deploy.serve.security import Keys
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What a client may choose: short, and of nothing that could break a log line or a header.
_ACCEPTED = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Open to all: whether the service lives, and the page, which holds no data and asks for a key.
_OPEN = {
    "/",
    "/docs",
    "/openapi.json",
    "/healthz",
    "/readyz",
    "/v2/health/live",
    "/v2/health/ready",
}
# Asked every few seconds by machines.
_UNTRACED = {b"/healthz", b"/readyz", b"/v2/health/live", b"/v2/health/ready", b"/metrics"}
_OPEN_FOLDERS = ("/static/", "/samples")
SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def accepted_id(given: str) -> str:
    """The request's id: the client's own, or a new one where that is none."""
    return given if _ACCEPTED.fullmatch(given) else uuid.uuid4().hex


class Edge:
    """The outermost layer of the application.

    :param root_path: the prefix a proxy serves this application under, which it may take off
        the paths it passes on, or leave there. A server's own (ASGI's ``root_path``) comes first.
    """

    def __init__(self, app: ASGIApp, keys: Keys, root_path: str = "") -> None:
        self.app, self._keys, self._root_path = app, keys, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        # The connection may have refused it, under an id, before it got here.
        request_id = state.get("request_id") or accepted_id(headers.get(REQUEST_ID, ""))
        state["request_id"] = request_id
        state["start"] = start
        method = scope["method"]
        scope, path = self._below_prefix(scope)
        service = getattr(scope["app"].state, "service", None) if "app" in scope else None
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = (REQUEST_ID.lower().encode(), request_id.encode())
                # Answers to unforeseen errors carry it already.
                kept = [pair for pair in message.get("headers", ()) if pair[0] != named[0]]
                message["headers"] = [*kept, named, *SECURITY]
                if service is not None and service.draining:
                    message["headers"].append((b"connection", b"close"))
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        if method == "HEAD":  # as GET, of which it wants the head: FastAPI's routes do not
            scope["method"] = "GET"
        try:
            app = self._refusal(scope, path, headers, state) or self.app
            await app(scope, receive, send_named)
        finally:
            record(
                service,
                state,
                method=method,
                path=scope.get("raw_path", b""),
                route=getattr(scope.get("route"), "path", "unmatched"),
                headers=headers,
                status=status,
                seconds=time.perf_counter() - start,
            )

    def _below_prefix(self, scope: Scope) -> tuple[Scope, str]:
        """The scope with ASGI's ``root_path`` and whole ``path``, and the path below it."""
        root, path = scope.get("root_path", "").rstrip("/") or self._root_path, scope["path"]
        if path == root or path.startswith(f"{root}/"):
            path = path[len(root) :]
        return {**scope, "root_path": root, "path": root + path}, path

    def _refusal(self, scope: Scope, path: str, headers: Headers, state: dict[str, Any]) -> Any:
        """The answer to a request without the key it needs, or to the page without its slash."""
        address = scope.get("client")
        state["client"] = address[0] if address else ""
        if not path:  # the page's own addresses are relative to the slash
            return RedirectResponse(f"{scope['root_path']}/")
        if not self._keys.needed or path in _OPEN or path.startswith(_OPEN_FOLDERS):
            return None
        try:
            name = self._keys.check(headers.get("authorization", ""), headers.get("x-api-key", ""))
        except RefusedError as error:
            named = {**(error.headers or {}), "Connection": "close"}
            return problem_response(Request(scope), error.status, error.detail, named)
        state["client"] = name
        return None


def record(
    service: Any,
    state: dict[str, Any],
    *,
    method: str,
    path: bytes,
    route: str,
    headers: Headers,
    status: int,
    seconds: float,
) -> None:
    """Count an answered request, trace it, and write it to the access log.

    :param service: None before there is one.
    :param state: of the request: its ``request_id``, ``client``, and what was noted of its work.
    :param path: as sent, in ASCII: a decoded one could hold a line break.
    """
    facts, status = state.get("facts", {}), state.get("refused", status)
    if service is not None:
        metrics = service.metrics
        metrics.requests.labels(route, str(status)).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        stages = state.get("stages", ())
        if facts:
            service.count(facts["model"], stages, facts["images"])
        if service.tracing.wanted and path not in _UNTRACED:
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
        request_id=state["request_id"],
        client=state.get("client", ""),
        method=method,
        path=path.decode("ascii", "replace")[:400],
        status=status,
        ms=round(seconds * 1e3, 3),
        **facts,
    )
