"""How much may be in hand: in all, and for one client."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.settings import Settings


class Admission:
    """Counts images from the end of their request's body to the end of its answer.

    Args:
        settings: The limits.
        backlog_seconds: How long what waits will take; Retry-After is at least that.
        on_reject: Called with the reason of each refusal.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        backlog_seconds: Callable[[], float] = lambda: 0.0,
        on_reject: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._limit = settings.workers + settings.queue_limit
        self._backlog_seconds, self._on_reject = backlog_seconds, on_reject
        self._clients: Counter[str] = Counter()
        self.in_hand = 0

    def check_room(self, client: str, images: int = 1) -> None:
        """Refuse early, before a body is read, what :meth:`admit` would refuse.

        Raises:
            RefusedError: 429, this client has too much in hand; 503, everybody has; 413, the
                request alone is more than is ever taken.
        """
        settings = self._settings
        if images > self._limit:
            raise RefusedError(
                413,
                f"The request holds {images} images, and {self._limit} is all that the service "
                "takes at a time. Send them in several requests.",
            )
        own = settings.client_limit
        if own is not None and self._clients[client] + images > own:
            self._on_reject("client")
            raise RefusedError(
                429,
                "You have as many images in hand here as one client may "
                f"({own}). Wait for answers before sending more.",
                self.retry_after(),
            )
        if self.in_hand + images > self._limit:
            self._on_reject("queue")
            raise RefusedError(
                503,
                "The service has as many requests waiting as it takes. Try again in a moment.",
                self.retry_after(),
            )

    @contextmanager
    def admit(self, client: str, images: int = 1) -> Iterator[None]:
        """Hold places for ``images``; refused as by :meth:`check_room`."""
        self.check_room(client, images)
        self.in_hand += images
        self._clients[client] += images
        try:
            yield
        finally:
            self.in_hand -= images
            self._clients[client] -= images
            if not self._clients[client]:
                del self._clients[client]

    def retry_after(self) -> dict[str, str]:
        """The header that says when to come back."""
        seconds = max(self._settings.retry_after_seconds, math.ceil(self._backlog_seconds()))
        return {"Retry-After": str(seconds)}
