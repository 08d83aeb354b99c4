"""``fdconv verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fdconv_deploy.commands.options import (
    Backend,
    BundlePath,
    Checkpoint,
    Config,
    Json,
    Settings,
    parse_settings,
)
from fdconv_deploy.errors import FDConvError


def verify(
    bundle: BundlePath,
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images; made-up inputs if none.")
    ] = None,
    config: Config = None,
    settings: Settings = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest error allowed, relative to the largest logit.")
    ] = 1e-4,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Compare a bundle with the PyTorch network, image by image."""
    from export.verify import verify_bundle
    from fdconv_deploy.checkpoints import load_checkpoint
    from fdconv_deploy.runtime import open_session, read_image

    with open_session(bundle, backend) as session:
        network = load_checkpoint(
            checkpoint, config=config, overrides=parse_settings(settings), require_fdconv=False
        )
        pictures = [(path.name, read_image(path)) for path in images or []]
        results = verify_bundle(session, network, pictures)
    if as_json:
        rows = [
            {"source": r.source, "batch": r.batch, **r.parity.model_dump(exclude={"name"})}
            for r in results
        ]
        print(json.dumps(rows, indent=2))
    else:
        table = Table("input", "error", "relative", "same class")
        for r in results:
            table.add_row(
                r.source,
                f"{r.parity.max_abs:.1e}",
                f"{r.parity.max_rel:.1e}",
                f"{r.parity.argmax_agreement or 0:.4%}",
            )
        Console().print(table)
    worst = max(r.parity.max_rel for r in results)
    if worst > tolerance:
        raise FDConvError(
            f"the bundle differs from the network by {worst:.1e} of the largest logit; "
            f"{tolerance:.0e} is allowed. Export it again."
        )
