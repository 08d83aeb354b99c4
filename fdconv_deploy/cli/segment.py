"""``fdconv segment``."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from fdconv_deploy.cli.options import (
    Backend,
    BundlePath,
    Factors,
    Flip,
    Quiet,
    how_it_ran,
    parse_scales,
    ran_by,
)
from fdconv_deploy.errors import ImageError


def segment(
    bundle: BundlePath,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT",
            help="Images and videos; folders, searched with their subfolders; quoted patterns "
            "such as 'data/**/*.jpg'; .txt files that list one path a line.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for the results; mirrors the folders of the inputs."
        ),
    ],
    fit: Annotated[
        Literal["stretch", "pad"] | None,
        typer.Option(
            help="How images of another aspect ratio are fitted, if not as the bundle says: "
            "stretched, or letterboxed."
        ),
    ] = None,
    multi_scale: Factors = None,
    flip: Flip = False,
    min_score: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Leave out a detector's objects that score less. [default: 0.3]"
        ),
    ] = None,
    opacity: Annotated[
        float, typer.Option(min=0, max=1, help="Opacity of the overlay's colours.")
    ] = 0.5,
    no_overlay: Annotated[
        bool, typer.Option("--no-overlay", help="Write masks only, no overlays.")
    ] = False,
    mask_video: Annotated[
        bool,
        typer.Option(
            "--mask-video",
            help="Write a video's masks as a video in the classes' colours, not as a PNG a frame.",
        ),
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Skip files whose results exist, to resume a run that was stopped.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that exist.")
    ] = False,
    backend: Backend = "auto",
    quiet: Quiet = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print a JSON object for each file, each on a line, and nothing else."
        ),
    ] = False,
) -> None:
    """Segment images and videos: a mask (indexed PNG) and an overlay for each image.

    A segmentor's classes.json and legend.png tell the class and colour of each mask value. A
    detector's bundle gives its objects as JSON, and its masks number the objects. Of a video,
    NAME_overlay.mp4 and a mask for each frame in NAME_masks are written.

    A file that cannot be read is named and skipped; the exit code is 1 then, and its line of
    --json has an "error".
    """
    if overwrite and skip_existing:
        raise typer.BadParameter("--overwrite and --skip-existing exclude each other; give one.")
    from fdconv_deploy.runtime import open_session
    from fdconv_deploy.runtime.detection import SHOWN_SCORE
    from fdconv_deploy.runtime.input_files import sources_at
    from fdconv_deploy.runtime.result_files import ResultOptions, segment_files

    scales = parse_scales(multi_scale, flip)
    sources = sources_at(inputs, output)
    options = ResultOptions(
        fit=fit,
        scales=scales,
        min_score=SHOWN_SCORE if min_score is None else min_score,
        opacity=opacity,
        overlays=not no_overlay,
        mask_video=mask_video,
        overwrite=overwrite,
        skip_existing=skip_existing,
    )
    skipped: list[Path] = []
    failed: list[str] = []
    done, start = 0, time.perf_counter()
    console = Console(stderr=True)
    frame = console.status("", spinner="dots")

    def fail(path: Path, error: ImageError) -> None:
        message = error.command_line or str(error)
        failed.append(message)
        if as_json:
            print(json.dumps({"image": str(path), "error": message}), flush=True)
        console.print(f"[yellow]Skipped:[/] {escape(message)}", soft_wrap=True, highlight=False)

    def show(path: Path, frames: int, expected: int | None) -> None:
        frame.start()
        of = f" of {expected}" if expected else ""
        frame.update(escape(f"{path}: frame {frames}{of}"))

    with open_session(bundle, backend) as session, ExitStack() as stack:
        stack.callback(frame.stop)
        if session.detects and scales is not None:
            raise typer.BadParameter("--multi-scale and --flip are for segmentors.")
        if session.detects and fit is not None:
            raise typer.BadParameter(
                "--fit is for segmentors; a detector's images keep their aspect ratio and are "
                "padded, as published."
            )
        if not session.detects and min_score is not None:
            raise typer.BadParameter("--min-score is for detectors; this is a segmentor.")
        for result in segment_files(
            session, sources, output, options, skipped=skipped.append, failed=fail, progress=show
        ):
            frame.stop()
            done += 1
            if as_json:
                how = {**how_it_ran(session), **(scales.as_dict() if scales else {})}
                print(json.dumps({**result.as_dict(), **how}), flush=True)
            elif not quiet:
                total = len(sources) - len(skipped)
                print(f"[{done + len(failed)}/{total}] {result.as_line()}", flush=True)
        if not (as_json or quiet):
            print(_summary(done, len(skipped), len(failed), time.perf_counter() - start, output))
            if done:
                print(ran_by(session))
    if failed:
        raise ImageError(
            f"{len(failed)} of {len(sources)} files could not be segmented; the first: {failed[0]}"
        )


def _summary(done: int, skipped: int, failed: int, seconds: float, output: Path) -> str:
    """The closing line: how many files went how, in what time, and where results are."""
    parts = [f"{done} segmented"]
    parts += [f"{skipped} skipped (results exist)"] if skipped else []
    parts += [f"{failed} failed"] if failed else []
    rate = f" ({done / seconds:.1f} files/s)" if done else ""
    return f"{', '.join(parts)} in {seconds:.1f} s{rate}. Results: {output}"
