"""``fdconv inspect``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from fdconv_deploy.cli.options import (
    Checkpoint,
    Config,
    Json,
    Settings,
    Size,
    Weights,
    parse_settings,
    parse_size,
    require_files,
)


def inspect(
    checkpoint: Checkpoint,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    size: Size = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every FDConv layer.")] = False,
    as_json: Json = False,
) -> None:
    """Check whether a checkpoint can be exported, and by which command; list what is in it.

    Exits with 1 if its network is not understood. (A plain network is, though export refuses it.)
    """
    pixels = parse_size(size) if size else None
    overrides = parse_settings(settings)
    require_files(checkpoint, config)

    from fdconv_deploy.checkpoints import inspect_checkpoint
    from fdconv_deploy.checkpoints.inspect import export_command, render

    with Console(stderr=True).status("reading", spinner="dots"):
        report = inspect_checkpoint(checkpoint, config, overrides=overrides, weights=weights)
    given = [] if config is None else ["--config", str(config)]
    given += [word for setting in settings or [] for word in ("--set", setting)]
    command = export_command(report, given, pixels)
    report = report.model_copy(update={"command": command})
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        render(report, Console(), layers=layers)
    if report.problem is not None:
        # The report has said why; a script must not take this file for one to export.
        raise typer.Exit(1)
