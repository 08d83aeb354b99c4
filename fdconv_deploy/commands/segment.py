"""``fdconv segment``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fdconv_deploy.commands.options import Backend, BundlePath, Json, Quiet
from fdconv_deploy.errors import ImageError


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
    """Segment images: a mask (indexed PNG) and an overlay for each.

    An image that cannot be read is named and passed over; the exit code is 1 then.
    """
    from fdconv_deploy.runtime import open_session
    from fdconv_deploy.runtime.files import segment_files

    failed: list[str] = []

    def passed_over(_image: Path, error: ImageError) -> None:
        failed.append(str(error))
        Console(stderr=True).print(f"[yellow]Passed over:[/] {escape(str(error))}")

    with open_session(bundle, backend) as session:
        results = segment_files(
            session, images, output, fit=fit, opacity=opacity, passed_over=passed_over
        )
        for result in results:
            if as_json:
                print(json.dumps(result.as_dict()))
            elif not quiet:
                print(result.as_line())
    if failed:
        raise ImageError(
            f"{len(failed)} of {len(images)} images could not be segmented; the first: {failed[0]}"
        )
