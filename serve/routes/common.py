"""What the routes share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request

from serve.problems import ClientGoneError
from serve.service import Service

T = TypeVar("T")
NO_LIMIT = 1e9
TimeoutMs = Annotated[
    float,
    Header(
        alias="X-Timeout-Ms",
        ge=1,
        le=NO_LIMIT,
        description="Milliseconds in which an answer is of use; then a 504. The service's own "
        "limit holds too.",
    ),
]


def service_of(request: Request) -> Service:
    """The application's service."""
    service: Service = request.app.state.service
    return service


def note(request: Request, **facts: Any) -> None:
    """Add facts to the request's line in the access log."""
    request.scope["state"].setdefault("facts", {}).update(facts)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, and cancel it when the client goes away.

    :raises ClientGoneError: it did.
    """
    task = asyncio.current_task()
    assert task is not None
    left = over = False

    def leave(_: Any) -> None:
        nonlocal left
        if not over:
            left = True
            task.cancel()

    # One task beside, not the work in a task of its own: most clients stay.
    gone = asyncio.ensure_future(_disconnected(request))
    gone.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left:
            raise ClientGoneError from None
        raise
    finally:
        over = True
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
