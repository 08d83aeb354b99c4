"""``fdconv segment``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fdconv_deploy.commands.options import Backend, BundlePath, Quiet, how_it_ran, ran_by
from fdconv_deploy.errors import ImageError


def segment(
    bundle: BundlePath,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE|FOLDER", help="Images, or folders that they lie in."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    fit: Annotated[
        str | None, typer.Option(metavar="stretch|pad", help="If not as the bundle says.")
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Leave out a detector's objects of less; 0.3 if not given."
        ),
    ] = None,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the overlay's colours.")] = 0.5,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that are there.")
    ] = False,
    backend: Backend = "auto",
    quiet: Quiet = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print a JSON object for each image, each on a line, and nothing else."
        ),
    ] = False,
) -> None:
    """Segment images: a mask (indexed PNG) and an overlay for each.

    A detector's bundle gives its objects as JSON beside them, and its mask numbers the objects.
    An image that cannot be read is named and passed over; the exit code is 1 then, and its line
    of --json has an "error".
    """
    from fdconv_deploy.runtime import open_session
    from fdconv_deploy.runtime.detection.detection import SHOWN_SCORE
    from fdconv_deploy.runtime.detection.files import DetectionResult, detect_files
    from fdconv_deploy.runtime.files import FileResult, segment_files
    from fdconv_deploy.runtime.listing import images_at

    failed: list[str] = []

    def passed_over(image: Path, error: ImageError) -> None:
        failed.append(str(error))
        if as_json:
            print(json.dumps({"image": str(image), "error": str(error)}))
        Console(stderr=True).print(
            f"[yellow]Passed over:[/] {escape(str(error))}", soft_wrap=True, highlight=False
        )

    pictures = images_at(images)

    with open_session(bundle, backend) as session:
        results: Iterator[FileResult | DetectionResult]
        if session.detects:
            if fit is not None:
                raise typer.BadParameter(
                    "--fit is of segmentors; a detector's images keep their proportions and are "
                    "padded, as published."
                )
            least = SHOWN_SCORE if min_score is None else min_score
            results = detect_files(
                session, pictures, output, min_score=least, opacity=opacity, overwrite=overwrite,
                passed_over=passed_over,
            )  # fmt: skip
        else:
            if min_score is not None:
                raise typer.BadParameter("--min-score is of detectors; this is a segmentor.")
            results = segment_files(
                session, pictures, output, fit=fit, opacity=opacity, overwrite=overwrite,
                passed_over=passed_over,
            )  # fmt: skip
        for result in results:
            if as_json:
                print(json.dumps({**result.as_dict(), **how_it_ran(session)}), flush=True)
            elif not quiet:
                print(result.as_line(), flush=True)
        if not (as_json or quiet) and len(failed) < len(pictures):
            print(ran_by(session))
    if failed:
        raise ImageError(
            f"{len(failed)} of {len(pictures)} images could not be segmented; the first: "
            f"{failed[0]}"
        )
