"""``fdconv serve``."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fdconv_deploy.cli.options import Backend, typed
from fdconv_deploy.environment import needed_by
from fdconv_deploy.errors import FDConvError

if TYPE_CHECKING:
    from pydantic import BaseModel


def serve(
    context: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE", help="Bundles, or folders of bundles.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines too.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")
    ] = 8000,
    backend: Backend = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per inference run.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Inference runs at a time.")] = 1,
    isolation: Annotated[
        Literal["thread", "process"],
        typer.Option(help="Run models in threads, or in a process per worker."),
    ] = "thread",
    queue_limit: Annotated[
        int | None, typer.Option("--queue", min=0, help="Images that may wait; more get a 503.")
    ] = None,
    batch_delay_ms: Annotated[
        float, typer.Option(min=0, help="Time that a batch waits to be filled.")
    ] = 0.0,
    load: Annotated[
        Literal["start", "demand"],
        typer.Option(help="Load models at the start, or each at its first request."),
    ] = "start",
    memory_budget_mb: Annotated[
        int | None,
        typer.Option(min=1, help="Unload models beyond it, the least recently used first."),
    ] = None,
    reload_seconds: Annotated[
        float, typer.Option(min=0, help="Interval to look for changed bundles; 0 for never.")
    ] = 0.0,
    model_control: Annotated[
        bool, typer.Option("--model-control", help="Let clients load and unload models.")
    ] = False,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of the KServe gRPC service.")
    ] = None,
    root_path: Annotated[
        str, typer.Option(metavar="/PREFIX", help="Path prefix at which a proxy serves this.")
    ] = "",
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File with one API key per line; requests must then present one."
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Certificate to serve HTTPS with.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Private key of the certificate.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Serve on a Ray cluster, as docs/ray.md says: HOST:PORT, auto or local.",
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Log as text, or as one JSON object per line.")
    ] = "text",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="Least important messages that are logged."),
    ] = "info",
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON",
            help="File of any settings (docs/serving.md); options on the command line win over it.",
        ),
    ] = None,
) -> None:
    """Serve bundles over HTTP: POST an image to /v1/segment, or try it in a browser at /."""
    # Read when numpy is imported. Codec threads share the cores already: OpenBLAS's own would
    # wait busily for them, and cost more than the products they share.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with needed_by("The service", "serve"):
        from fdconv_deploy import serve as service
        from fdconv_deploy.serve.settings import RaySettings, read_keys
    given = {name: value for name, value in typed(context).items() if name not in _NO_SETTINGS}
    if "memory_budget_mb" in given:
        given["memory_budget_bytes"] = given.pop("memory_budget_mb") << 20
    if api_keys is not None:
        given["api_keys"] = read_keys(api_keys)
    given = {**_read(settings), **given}
    if ray is None:
        service.run(bundles, host, port, _checked(given, service.Settings), log_level=log_level)
        return
    if "log_level" in typed(context):
        raise typer.BadParameter("--log-level is not for --ray: Ray's logging_config says it.")
    if "workers" in given:
        given["replicas"] = given.pop("workers")
    wanted = _checked({**given, "bundles": bundles}, RaySettings)
    from fdconv_deploy.serve import ray as on_ray

    on_ray.run(wanted, ray, host, port)


_NO_SETTINGS = ("bundles", "host", "port", "log_level", "settings", "ray")


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        # Windows' editors begin a file with a mark that JSON does not know.
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FDConvError(f"the settings in {path} are not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise FDConvError(f"the settings in {path} must be a JSON object.")
    return found


def _checked(values: dict[str, Any], kind: type[BaseModel]) -> Any:
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        said = said.replace("a valid tuple", "a list")  # as JSON calls it
        if not first["loc"]:
            raise FDConvError(f"the settings do not fit together: {said}.") from error
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, kind.model_fields, 1)
            hint = f"did you mean {near[0]}?" if near else "docs/serving.md lists those there are."
            raise FDConvError(f"there is no setting {where}; {hint}") from error
        # A key is a secret, and errors end in logs.
        found = "what was given" if first["loc"][0] == "api_keys" else repr(first["input"])
        raise FDConvError(f"the setting {where} cannot be {found}: {said}.") from error
