"""``fdconv serve``."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fdconv_deploy.cli.options import Backend
from fdconv_deploy.environment import needed_by
from fdconv_deploy.errors import FDConvError


def serve(
    context: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE", help="Bundles, or folders of them.")
    ],
    host: Annotated[str, typer.Option(help="0.0.0.0 listens to other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    backend: Backend = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per run.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Inference runs at a time.")] = 1,
    isolation: Annotated[
        str,
        typer.Option(metavar="thread|process", help="Run models in threads, or a process each."),
    ] = "thread",
    queue: Annotated[int, typer.Option(min=0, help="Images that may wait; more get 503.")] = 16,
    batch_delay_ms: Annotated[float, typer.Option(min=0, help="Wait for more to run with.")] = 0.0,
    load: Annotated[
        str, typer.Option(metavar="start|demand", help="When models are loaded.")
    ] = "start",
    memory_budget_mb: Annotated[
        int | None, typer.Option(min=1, help="Unload models beyond it, least used first.")
    ] = None,
    reload_seconds: Annotated[
        float, typer.Option(min=0, help="Look for changed bundles so often; 0 never.")
    ] = 0.0,
    model_control: Annotated[
        bool,
        typer.Option(
            "--model-control/--no-model-control", help="Clients may load and unload models."
        ),
    ] = False,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve KServe's gRPC there too.")
    ] = None,
    root_path: Annotated[
        str, typer.Option(metavar="/PREFIX", help="Path prefix at which a proxy serves this.")
    ] = "",
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One key a line; then one is needed.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Serve HTTPS by it.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="The certificate's.")] = None,
    log_format: Annotated[
        str, typer.Option(metavar="text|json", help="A line, or an object a line.")
    ] = "text",
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")
    ] = "info",
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON",
            help="A file of any settings; see docs/serving.md. Options given here win over it.",
        ),
    ] = None,
) -> None:
    """Serve bundles over HTTP: POST an image to /v1/segment, or try it in a browser at /."""
    # Read when numpy is imported. Codec threads share the cores already: OpenBLAS's own would
    # wait busily for them, and cost more than the products they share.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with needed_by("The service", "serve"):
        from fdconv_deploy import serve as service
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(
            f"--log-level is debug, info, warning or error, not {log_level!r}."
        )
    given: dict[str, Any] = {
        "backend": backend,
        "threads": threads,
        "workers": workers,
        "isolation": isolation,
        "queue_limit": queue,
        "batch_delay_ms": batch_delay_ms,
        "load": load,
        "memory_budget_bytes": memory_budget_mb and memory_budget_mb << 20,
        "reload_seconds": reload_seconds,
        "model_control": model_control,
        "grpc_port": grpc_port,
        "root_path": root_path,
        "api_keys": api_keys and _keys(api_keys),
        "tls_certificate": tls_certificate,
        "tls_key": tls_key,
        "log_format": log_format,
    }
    typed = {
        setting: value
        for setting, value in given.items()
        if _was_typed(context, _OPTIONS.get(setting, setting))
    }
    service.run(bundles, host, port, _checked({**_read(settings), **typed}), log_level=log_level)


# Options that are not called as the setting they give.
_OPTIONS = {"queue_limit": "queue", "memory_budget_bytes": "memory_budget_mb"}


def _was_typed(context: typer.Context, option: str) -> bool:
    """Whether an option was given at all, be it with its default value."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _keys(path: Path) -> list[str]:
    """One key a line. A file without any would leave the service open, unasked."""
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise FDConvError(f"The API keys in {path} cannot be read: {reason}.") from error
    if not keys:
        raise FDConvError(
            f"{path} holds no API key, and without one anybody is answered. Write one a line into "
            "it, or leave --api-keys out."
        )
    return keys


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FDConvError(f"the settings in {path} are not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise FDConvError(f"the settings in {path} must be a JSON object.")
    return found


def _checked(values: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from fdconv_deploy.serve import Settings

    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        if not first["loc"]:
            raise FDConvError(f"the settings do not fit together: {said}.") from error
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, Settings.model_fields, 1)
            hint = f"did you mean {near[0]}?" if near else "docs/serving.md lists those there are."
            raise FDConvError(f"there is no setting {where}; {hint}") from error
        raise FDConvError(f"the setting {where} cannot be {first['input']!r}: {said}.") from error
