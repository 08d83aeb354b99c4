"""The application and its server: ``create_app`` for any ASGI server, ``run`` and ``running``."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from fdconv_deploy import __version__
from fdconv_deploy.environment import needed_by
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.runtime import Session
from fdconv_deploy.serve import errors as problems
from fdconv_deploy.serve import openapi
from fdconv_deploy.serve.http_limits import MAX_HEAD_BYTES, Held, LimitedProtocol
from fdconv_deploy.serve.middleware import EXPOSED, Clients, Edge, refuse
from fdconv_deploy.serve.routes import kserve, segment, status
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.settings import Settings
from fdconv_deploy.serve.telemetry import log_config

log = logging.getLogger("fdconv.serve")
Sources = Sequence[Path | str | Session]
# glibc's names for mallopt, see mallopt(3), and bytes.
_TRIM_THRESHOLD, _KEPT = -1, 32 << 20
_MMAP_THRESHOLD, _LARGE = -3, 4 << 20


class ServerError(FDConvError):
    """The server cannot listen, or did not become ready."""


def create_app(
    bundles: Sources,
    settings: Settings | None = None,
    *,
    host: str = "127.0.0.1",
    make_service: Callable[[Sources, Settings], Service] = Service,
) -> FastAPI:
    """Make the service's application.

    Args:
        bundles: Bundle folders, each served under its folder's name; folders of bundles; or
            sessions already open, which stay the caller's to close. The first is the default model.
        settings: Limits, sizes and policies; the defaults when None.
        host: Where gRPC listens, if ``settings.grpc_port`` is set.
        make_service: Makes what holds and runs the models.

    Raises:
        BundleError: A bundle is damaged, unsafe, neither a segmentor nor a detector, or of the
            same name as another.
        BackendError: The backend cannot be used.
        FDConvError: What a setting needs is not installed.
    """
    settings = settings or Settings()
    if settings.grpc_port is not None:
        with needed_by("The gRPC service", "grpc"):
            from fdconv_deploy.serve.kserve.grpc_server import GrpcServer
    clients = Clients(settings)
    service = make_service(bundles, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Models load beside the event loop, so that /healthz answers while large ones do.
        await service.start()
        grpc = None
        try:
            if settings.grpc_port is not None:
                grpc = app.state.grpc = GrpcServer(service, clients)
                await grpc.start(host, settings.grpc_port)
            yield
        finally:
            service.drain()
            if grpc is not None:
                await grpc.stop(settings.drain_seconds)
            await service.close()

    middleware = [Middleware(Edge, service=service, clients=clients)]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED,
            max_age=3600,
        )
        # Outermost, for refusals are read by pages of other origins, too.
        middleware.insert(0, cors)
    app = FastAPI(
        title="FDConv Deploy",
        version=__version__,
        description=openapi.DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # a page of our own: FastAPI's loads its scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # openapi.py's own: FastAPI's writes the document anew for each request
        redirect_slashes=False,
        separate_input_output_schemas=False,
        # Edge does that, with the stages; versions without it take any name.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        middleware=middleware,
    )
    app.state.service, app.state.clients = service, clients
    problems.install(app)
    for group in (segment, kserve, status):  # in the order in which they are tried
        # Not include_router, whose routers would match every request twice.
        app.router.routes += group.router.routes
    openapi.install(app, service)
    return app


def run(
    bundles: Sources,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: Settings | None = None,
    *,
    log_level: str = "info",
) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished first.

    Args:
        bundles: As for :func:`create_app`.
        host: "127.0.0.1" is this machine only, "0.0.0.0" everyone who can reach it.
        port: 0 lets the system choose one, which the log names.
        settings: As for :func:`create_app`.
        log_level: "debug", "info", "warning" or "error".

    Raises:
        ServerError: The port is taken, the host is not this machine's, or TLS files cannot be used.
        FDConvError: As for :func:`create_app`.
    """
    settings = settings or Settings()
    return_large_blocks()
    allow_files(settings.max_connections)
    with _bound(host, port) as listener:
        server = _Server(bundles, settings, log_level, host)
        log.info("listening on %s (try it at /, API at /docs)", _address(listener, settings))
        server.run([listener])


@contextmanager
def running(
    bundles: Sources,
    host: str = "127.0.0.1",
    port: int = 0,
    settings: Settings | None = None,
    *,
    ready_within: float = 120.0,
) -> Iterator[str]:
    """Serve on another thread for the length of a ``with`` block, as :func:`run` does.

    Yields:
        The server's address, ``http://host:port``, once it is ready.

    Raises:
        ServerError: As for :func:`run`, or it was not ready within ``ready_within`` seconds.
    """
    settings = settings or Settings()
    with _bound(host, port) as listener:
        server = _Server(bundles, settings, "warning", host)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            end = time.monotonic() + ready_within
            while not (server.started and server.service.ready):
                if not thread.is_alive() or time.monotonic() > end:
                    raise ServerError("The service did not become ready; its log says why.")
                time.sleep(0.02)
            yield _address(listener, settings)
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """Uvicorn, which on its way down is first unready, then stops listening, then drains."""

    def __init__(self, bundles: Sources, settings: Settings, log_level: str, host: str) -> None:
        self._settings = settings
        for path in (settings.tls_certificate, settings.tls_key, settings.tls_client_ca):
            if path is not None and not path.is_file():
                raise ServerError(f"TLS needs the file {path}, which does not exist.")
        if settings.grpc_port is not None:
            # gRPC binds when the models load, shares a port with whoever has it, or ends in a
            # traceback.
            _bound(host, settings.grpc_port).close()
        self._app = app = create_app(bundles, settings, host=host)
        self.service: Service = app.state.service
        refusal = partial(refuse, self.service, app.state.clients)
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(LimitedProtocol, settings, refusal, Held()),  # type: ignore[arg-type]
                ws="none",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                log_level=log_level,
                log_config=log_config(log_level, settings.log_format),
                access_log=False,
                proxy_headers=False,  # the middleware heeds them, and only from whom it is told to
                server_header=False,
                timeout_graceful_shutdown=settings.drain_seconds,
                ssl_certfile=settings.tls_certificate,
                ssl_keyfile=settings.tls_key,
                ssl_ca_certs=settings.tls_client_ca,
                ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
            )
        )
        try:
            self.config.load()
        except (ssl.SSLError, ValueError) as error:
            raise ServerError(
                f"The TLS certificate and key cannot be used ({error}). Give a matching pair in "
                "PEM form."
            ) from error

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See ``uvicorn.Server``, which leaves TLS a minute for each handshake."""
        if self.config.ssl is not None:
            loop, settings = asyncio.get_running_loop(), self._settings
            loop.create_server = partial(  # type: ignore[method-assign]
                loop.create_server,
                ssl_handshake_timeout=settings.header_seconds,
                ssl_shutdown_timeout=settings.write_seconds,
            )
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See ``uvicorn.Server``; a second signal ends it without waiting."""
        self.service.drain()
        end = time.monotonic() + self._settings.shutdown_delay_seconds
        while time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        stops = [super().shutdown(sockets)]
        if self._settings.grpc_port is not None:  # beside HTTP, not after it
            stops.append(self._app.state.grpc.stop(self._settings.drain_seconds))
        await asyncio.gather(*stops)


def _bound(host: str, port: int) -> socket.socket:
    # Bound here and not by uvicorn, which ends the process when it cannot.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else error
        raise ServerError(
            f"The service cannot listen on {host}, port {port} ({reason}). Stop what uses that "
            "port, or give another one."
        ) from error


def _address(listener: socket.socket, settings: Settings) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.tls_certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def allow_files(connections: int) -> None:
    """Let the process open as many files as its connections need, where the system permits that.

    Many systems give a process 1024 unless it asks.
    """
    wanted = 2 * connections + 1024  # with gRPC's
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def return_large_blocks() -> bool:
    """Let blocks of 4 MiB and more be mapped by themselves, and so return when they are freed.

    glibc raises that size to the largest block ever freed, up to 32 MiB. One large image would
    be enough, and from then on what is decoded lies among what stays, and keeps memory that
    nobody uses. Smaller blocks, tensors among them, are reused without asking the system.
    False where the system's allocator does not take that.
    """
    if not sys.platform.startswith("linux"):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    return bool(set_option(_MMAP_THRESHOLD, _LARGE) and set_option(_TRIM_THRESHOLD, _KEPT))
