"""``fdconv serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fdconv_deploy.commands.options import Backend
from fdconv_deploy.errors import FDConvError


def serve(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles to serve.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 listens to other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    backend: Backend = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Inference runs at a time.")] = 1,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 503.")] = 16,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve bundles over HTTP: POST an image to /v1/segment."""
    try:
        import serve as service
        from serve.settings import Settings as ServiceSettings
    except ImportError as error:
        raise FDConvError(
            f"the service needs {error.name}, which is not installed: "
            "pip install 'fdconv-deploy[serve]'."
        ) from error
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(
            f"--log-level is debug, info, warning or error, not {log_level!r}."
        )
    settings = ServiceSettings(backend=backend, workers=workers, queue_limit=queue)
    service.run(bundles, host, port, settings, log_level=log_level)
