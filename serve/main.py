"""Starting a server: in the foreground for a command, or beside other work."""

from __future__ import annotations

import copy
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.runtime import Session

from .app import create_app
from .settings import Settings

log = logging.getLogger("fdconv.serve")


class ServerError(FDConvError):
    """The server cannot listen, or did not become ready."""


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
    :raises BundleError, BackendError: see ``create_app``.
    """
    with _bound(host, port) as listener:
        server = _server(bundles, settings or Settings(), log_level)
        log.info("listening on %s (documentation at /docs)", _address(listener))
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
    with _bound(host, port) as listener:
        server = _server(bundles, settings or Settings(), "warning")
        address = _address(listener)
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
    bundles: Sequence[Path | str | Session], settings: Settings, log_level: str
) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(bundles, settings),
        log_level=log_level,
        log_config=_log_config(log_level),
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    return uvicorn.Server(config)


def _log_config(level: str) -> dict[str, Any]:
    """Uvicorn's logging, with the service's own log beside it."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["loggers"]["fdconv.serve"] = {"handlers": ["default"], "level": level.upper()}
    return config


def _bound(host: str, port: int) -> socket.socket:
    # Bound here and not by uvicorn, which ends the process when it cannot.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServerError(
            f"The service cannot listen on {host}, port {port} ({reason}). Stop what uses that "
            "port, or give another one."
        ) from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _wait_until_ready(address: str, thread: threading.Thread, deadline: float) -> None:
    while thread.is_alive() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/readyz", timeout=1):  # noqa: S310 - http
                return
        except urllib.error.HTTPError as error:
            error.close()  # 503: not ready yet
        except OSError:
            pass  # it does not accept connections yet
        time.sleep(0.02)
    raise ServerError("The service did not become ready; its log says why.")
