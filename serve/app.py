"""The application: models, limits and routes put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fdconv_deploy.serve import errors as problems
from fdconv_deploy.serve import openapi
from fdconv_deploy.serve.middleware import Edge
from fdconv_deploy.serve.routes import ROUTERS
from fdconv_deploy.serve.security import Keys
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.settings import Settings
from starlette.middleware import Middleware

from fdconv_deploy.environment import needed_by
from fdconv_deploy.runtime import Session
from fdconv_deploy.version import __version__

if TYPE_CHECKING:
    from fdconv_deploy.serve.kserve.grpc_server import GrpcServer


def create_app(
    bundles: Sequence[Path | str | Session],
    settings: Settings | None = None,
    *,
    host: str = "127.0.0.1",
) -> FastAPI:
    """Make the service's application.

    :param bundles: bundle folders, each served under its folder's name; folders of bundles; or
        sessions already open, which stay the caller's to close. The first is the default model.
    :param host: where gRPC listens, if ``settings.grpc_port`` is set.
    :raises BundleError: a bundle is damaged, unsafe, neither a segmentor nor a detector, or of
        the same name as another.
    :raises BackendError: the backend cannot be used.
    :raises FDConvError: what a setting needs is not installed.
    """
    settings = settings or Settings()
    serving = None if settings.grpc_port is None else _grpc_server()
    keys = Keys(settings)
    service = Service(bundles, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Models load beside the event loop, so that /healthz answers while large ones do.
        await service.start()
        grpc = None
        try:
            if serving is not None and settings.grpc_port is not None:
                grpc = serving(service, keys)
                await grpc.start(host, settings.grpc_port)
                app.state.grpc_port = grpc.port
            yield
        finally:
            service.drain()
            if grpc is not None:
                await grpc.stop(settings.drain_seconds)
            await service.close()

    app = FastAPI(
        title="FDConv Deploy",
        version=__version__,
        description=openapi.DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # a page of our own: FastAPI's loads its scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        # Edge does that, with the stages; versions without it take any name.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        middleware=[Middleware(Edge, keys=keys, root_path=settings.root_path)],
    )
    app.state.service, app.state.api_keys = service, keys
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    openapi.install(app, service, keys_needed=keys.needed)
    return app


def _grpc_server() -> type[GrpcServer]:
    with needed_by("The gRPC service", "grpc"):
        from fdconv_deploy.serve.kserve.grpc_server import GrpcServer
    return GrpcServer
