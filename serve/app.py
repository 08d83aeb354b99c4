"""The application: models, limits and routes put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from fdconv_deploy import __version__
from fdconv_deploy.runtime import Session

from . import problems
from .middleware import RequestId
from .models import Models
from .routes import router
from .settings import Settings
from .state import ServiceState

_DESCRIPTION = """\
Semantic segmentation with FDConv networks.

```
curl -F image=@street.jpg -H 'Accept: image/png' http://localhost:8000/v1/segment -o mask.png
curl --data-binary @street.jpg -H 'Content-Type: image/jpeg' http://localhost:8000/v1/segment
curl -F image=@street.jpg 'http://localhost:8000/v1/segment?output=overlay' -o overlay.png
```

Errors are problem documents (RFC 9457) with a sentence in `detail`. Every answer carries an
`X-Request-ID`, the client's own if it sent one.
"""


def create_app(
    bundles: Sequence[Path | str | Session], settings: Settings | None = None
) -> FastAPI:
    """Make the service's application.

    :param bundles: bundle folders, each served under its folder's name, or sessions already
        open, which stay the caller's to close. The first is the default model.
    :raises BundleError: a bundle is damaged, unsafe, no segmentor of two classes or more, or
        of the same name as another.
    :raises BackendError: the backend cannot be used.
    """
    settings = settings or Settings()
    models = Models(bundles, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = ServiceState(models, settings)
        app.state.service = state
        # Beside the event loop, so that /healthz answers while large models load.
        warming = asyncio.create_task(state.warm_up())
        try:
            yield
        finally:
            await warming
            state.close()

    app = FastAPI(
        title="FDConv Deploy",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
    )
    app.add_middleware(RequestId)
    problems.install(app)
    app.include_router(router)
    return app
