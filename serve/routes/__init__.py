"""The service's routes, one file per group of addresses, and what they share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import groupby
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from fdconv_deploy.serve.batching import After
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.telemetry import Stages

T = TypeVar("T")
# Parts of a body that are joined: a message more costs more than copying so much.
_JOINED_BYTES = 1 << 20
# How long work goes on before it is watched whether its client stays: the event loop, woken during
# a run, would take its core from it.
_WATCHED_AFTER_SECONDS = 0.05


class Parts(Response):
    """A body in parts, of which the large ones are sent one after another, not joined first.

    Headers are pairs of bytes, in lower case.
    """

    def __init__(self, parts: list[Any], media_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        length = (b"content-length", b"%d" % sum(map(len, parts)))
        self.raw_headers = [(b"content-type", media_type), length, *headers]
        self._parts: list[Any] = []
        for large, some in groupby(parts, lambda part: len(part) > _JOINED_BYTES):
            group = list(some)
            self._parts += group if large else [b"".join(group)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = len(self._parts) - 1
        for place, part in enumerate(self._parts):
            await send({"type": "http.response.body", "body": part, "more_body": place < last})


def service_of(request: Request) -> Service:
    """The application's service."""
    service: Service = request.app.state.service
    return service


def answered(request: Request, model: str, images: int, stages: Stages) -> None:
    """Note what was done, for the middleware to count, log and trace once the answer is sent."""
    state = request.scope["state"]
    state["facts"], state["stages"] = {"model": model, "images": images}, stages


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, and cancel it when the client goes away (ClientDisconnect)."""
    task, watching = asyncio.current_task(), list[asyncio.Task[None]]()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    try:
        # Not at once: the work has begun by then, and does not wait for this.
        with After(_WATCHED_AFTER_SECONDS, lambda: watching.append(asyncio.create_task(watch()))):
            return await work
    except asyncio.CancelledError:
        if left:
            raise ClientDisconnect from None
        raise
    finally:
        for watcher in watching:
            watcher.cancel()
