"""``fdconv segment``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fdconv_deploy.commands.options import Backend, BundlePath, Json, Quiet


def segment(
    bundle: BundlePath,
    images: Annotated[list[Path], typer.Argument(help="Images to segment.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    fit: Annotated[
        str | None, typer.Option(help="stretch or pad, if not as the bundle says.")
    ] = None,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the overlay's colours.")] = 0.5,
    backend: Backend = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Segment images: a mask (indexed PNG) and an overlay for each."""
    from fdconv_deploy.runtime import open_session
    from fdconv_deploy.runtime.files import segment_files

    with open_session(bundle, backend) as session:
        for result in segment_files(session, images, output, fit=fit, opacity=opacity):
            if as_json:
                print(json.dumps(result.as_dict()))
            elif not quiet:
                print(result.as_line())
