"""What one application holds while it runs."""

from __future__ import annotations

import logging

from .models import Models
from .problems import RefusedError
from .settings import Settings
from .workers import Workers

log = logging.getLogger("fdconv.serve")


class ServiceState:
    """The models, the threads, and whether they are ready."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.workers = Workers(settings)
        self._readiness = "The models are still being loaded. Try again in a moment."
        self._ready = False

    async def warm_up(self) -> None:
        """Load every model and run it once; then the service is ready."""
        try:
            for model in self.models:
                seconds = await self.workers.infer(model.session.warm_up)
                session = model.session
                log.info("%s: ready in %.1f s. %s", model.name, seconds, session.choice)
        except Exception:
            # The process stays up and unready: whoever runs it sees why, in its log.
            log.exception("a model failed to start")
            self._readiness = "A model failed to start; the server's log says why."
        else:
            self._ready = True

    def check_ready(self) -> None:
        """Refuse while models are loading.

        :raises RefusedError: 503.
        """
        if not self._ready:
            after = {"Retry-After": str(self.settings.retry_after_seconds)}
            raise RefusedError(503, self._readiness, after)

    def close(self) -> None:
        """Finish what was begun; let go of models and threads."""
        self._ready = False
        self._readiness = "The service is stopping."
        self.workers.close()
        self.models.close()
