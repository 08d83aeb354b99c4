"""``fdconv inspect``."""

from __future__ import annotations

import typer
from rich.console import Console

from fdconv_deploy.commands.options import (
    Checkpoint,
    Config,
    Json,
    Settings,
    Size,
    parse_settings,
    parse_size,
)


def inspect(
    checkpoint: Checkpoint,
    config: Config = None,
    settings: Settings = None,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Say what is in a checkpoint, what was told by it and what was assumed.

    Exit code 1 if its network is not one that can be exported as it is.
    """
    from fdconv_deploy.checkpoints import inspect_checkpoint, render

    pixels = parse_size(size) if size else (512, 512)
    report = inspect_checkpoint(
        checkpoint, config=config, size=pixels, overrides=parse_settings(settings)
    )
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        render(report, Console())
    if report.problem is not None:
        # The report has said why; a script must not take this file for one to export.
        raise typer.Exit(1)
