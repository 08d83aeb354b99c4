"""Starting a server: in the foreground for a command, or beside other work."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fdconv_deploy.serve.app import create_app
from fdconv_deploy.serve.logging import log_config
from fdconv_deploy.serve.memory import return_large_blocks
from fdconv_deploy.serve.protocol import guarded
from fdconv_deploy.serve.settings import Settings

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.runtime import Session

log = logging.getLogger("fdconv.serve")


class ServerError(FDConvError):
    """The server cannot listen, or did not become ready."""


class Server(uvicorn.Server):
    """Uvicorn, which on its way down is first unready, then stops listening, then drains."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See ``uvicorn.Server``; a second signal ends it without waiting."""
        self.config.app.state.service.drain()  # type: ignore[union-attr]
        end = time.monotonic() + self._settings.shutdown_delay_seconds
        while time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def run(
    bundles: Sequence[Path | str | Session],
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: Settings | None = None,
    *,
    log_level: str = "info",
) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished first.

    :param host: "127.0.0.1" is this machine only, "0.0.0.0" everyone who can reach it.
    :param port: 0 lets the system choose one, which the log names.
    :raises ServerError: the port is taken, or the host not this machine's.
    :raises BundleError, BackendError, FDConvError: see ``create_app``.
    """
    settings = settings or Settings()
    return_large_blocks()
    with _bound(host, port) as listener:
        server = _server(bundles, settings, log_level, host)
        log.info("listening on %s (try it at /, API at /docs)", _address(listener, settings))
        server.run([listener])


@contextmanager
def running(
    bundles: Sequence[Path | str | Session],
    host: str = "127.0.0.1",
    port: int = 0,
    settings: Settings | None = None,
    *,
    ready_within: float = 120.0,
) -> Iterator[str]:
    """Serve on another thread for the length of a ``with`` block.

    :returns: the server's address, ``http://host:port``, once it is ready.
    :raises ServerError: as for ``run``, or it was not ready within ``ready_within`` seconds.
    """
    settings = settings or Settings()
    with _bound(host, port) as listener:
        server = _server(bundles, settings, "warning", host)
        address = _address(listener, settings)
        thread = threading.Thread(
            target=server.run, args=([listener],), name="fdconv-serve", daemon=True
        )
        thread.start()
        try:
            _wait_until_ready(address, thread, time.monotonic() + ready_within)
            yield address
        finally:
            server.should_exit = True
            thread.join()


def _server(
    bundles: Sequence[Path | str | Session], settings: Settings, log_level: str, host: str
) -> Server:
    certificate, key = settings.tls_certificate, settings.tls_key
    for path in (certificate, key, settings.tls_client_ca):
        if path is not None and not path.is_file():
            raise ServerError(f"TLS needs the file {path}, which does not exist.")
    if settings.grpc_port is not None:
        # gRPC binds when the models load, shares a port with whoever has it, or ends in a
        # traceback.
        _bound(host, settings.grpc_port).close()
    try:
        config = uvicorn.Config(
            create_app(bundles, settings, host=host),
            http=guarded(settings),  # type: ignore[arg-type]
            ws="none",
            log_level=log_level,
            log_config=log_config(log_level, settings.log_format),
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.drain_seconds,
            ssl_certfile=None if certificate is None else str(certificate),
            ssl_keyfile=None if key is None else str(key),
            ssl_ca_certs=None if settings.tls_client_ca is None else str(settings.tls_client_ca),
            ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
        )
        config.load()
    except (ssl.SSLError, ValueError) as error:
        raise ServerError(
            f"The TLS certificate and key cannot be used ({error}). Give a matching pair in PEM "
            "form."
        ) from error
    return Server(config, settings)


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


def _wait_until_ready(address: str, thread: threading.Thread, deadline: float) -> None:
    # Our own server on this machine, whose certificate may be for another name.
    context = ssl._create_unverified_context() if address.startswith("https") else None  # noqa: S323
    while thread.is_alive() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(  # noqa: S310 - http
                f"{address}/readyz", timeout=1, context=context
            ):
                return
        except urllib.error.HTTPError as error:
            error.close()  # 503: not ready yet
        except OSError:
            pass  # it does not accept connections yet
        time.sleep(0.02)
    raise ServerError("The service did not become ready; its log says why.")
