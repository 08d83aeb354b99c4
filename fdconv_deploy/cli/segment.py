"""``fdconv segment``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from fdconv_deploy.cli.options import Backend, BundlePath, Quiet, how_it_ran, ran_by
from fdconv_deploy.errors import ImageError

if TYPE_CHECKING:
    from fdconv_deploy.runtime import Session
    from fdconv_deploy.runtime.input_files import Source
    from fdconv_deploy.runtime.result_files import DetectionResult, Failed, FileResult
    from fdconv_deploy.runtime.video import VideoResult


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
            help="Skip files whose results are there, to go on with a run that was stopped.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results that are there.")
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
    from fdconv_deploy.runtime import open_session
    from fdconv_deploy.runtime.input_files import sources_at

    if overwrite and skip_existing:
        raise typer.BadParameter("--overwrite and --skip-existing exclude each other; give one.")
    sources = sources_at(inputs, output)
    options = _Options(
        fit, min_score, opacity, not no_overlay, mask_video, skip_existing, overwrite
    )
    skipped: list[Path] = []
    failed: list[str] = []
    done, start = 0, time.perf_counter()

    def fail(path: Path, error: ImageError) -> None:
        message = error.command_line or str(error)
        failed.append(message)
        if as_json:
            print(json.dumps({"image": str(path), "error": message}), flush=True)
        Console(stderr=True).print(
            f"[yellow]Skipped:[/] {escape(message)}", soft_wrap=True, highlight=False
        )

    with open_session(bundle, backend) as session:
        _check(session, options)
        for result in _results(session, sources, output, options, skipped.append, fail):
            done += 1
            if as_json:
                print(json.dumps({**result.as_dict(), **how_it_ran(session)}), flush=True)
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


@dataclass(frozen=True)
class _Options:
    """What the command line asks for."""

    fit: Literal["stretch", "pad"] | None
    min_score: float | None
    opacity: float
    overlays: bool
    mask_video: bool
    skip_existing: bool
    overwrite: bool


def _check(session: Session, options: _Options) -> None:
    if session.detects and options.fit is not None:
        raise typer.BadParameter(
            "--fit is for segmentors; a detector's images keep their aspect ratio and are "
            "padded, as published."
        )
    if not session.detects and options.min_score is not None:
        raise typer.BadParameter("--min-score is for detectors; this is a segmentor.")


def _results(
    session: Session,
    sources: Sequence[Source],
    output: Path,
    options: _Options,
    skipped: Callable[[Path], None],
    failed: Failed,
) -> Iterator[FileResult | DetectionResult | VideoResult]:
    """Results one by one as they are written: those of images, then those of videos."""
    from fdconv_deploy.runtime.detection import SHOWN_SCORE
    from fdconv_deploy.runtime.result_files import (
        detect_files,
        detector_answering,
        is_there,
        segment_files,
        segmentor_answering,
        write_legend,
    )
    from fdconv_deploy.runtime.video import segment_video, video_places

    least = SHOWN_SCORE if options.min_score is None else options.min_score
    images = [source for source in sources if not source.is_video]
    videos = [source for source in sources if source.is_video]
    replace = options.overwrite or options.skip_existing
    places = video_places(
        videos, output, overlays=options.overlays, mask_video=options.mask_video,
        masks=not session.detects or session.finds_masks, objects=session.detects,
        overwrite=replace,
    )  # fmt: skip
    shared: dict[str, Any] = {
        "opacity": options.opacity, "overlays": options.overlays, "overwrite": options.overwrite,
        "skip_existing": options.skip_existing, "skipped": skipped, "failed": failed,
    }  # fmt: skip
    if images and session.detects:
        yield from detect_files(session, images, output, min_score=least, **shared)
    elif images:
        yield from segment_files(session, images, output, fit=options.fit, **shared)
    if not videos:
        return
    if session.detects:
        answering: Any = detector_answering(session, least)
    else:
        answering = segmentor_answering(session, options.fit)
        write_legend(session, output, options.overwrite)
    for video in videos:
        if options.skip_existing and all(map(is_there, places[video].values())):
            skipped(video.path)
            continue
        with Console(stderr=True).status(f"{video.path}", spinner="dots") as status:

            def show(
                frames: int, expected: int | None, status: Any = status, path: Path = video.path
            ) -> None:
                status.update(f"{path}: frame {frames}" + (f" of {expected}" if expected else ""))

            try:
                result = segment_video(
                    answering, video, places[video], opacity=options.opacity, overwrite=replace,
                    progress=show,
                )  # fmt: skip
            except ImageError as error:
                failed(video.path, error)
                continue
        yield result


def _summary(done: int, skipped: int, failed: int, seconds: float, output: Path) -> str:
    """The closing line: how many files went how, in what time, and where results are."""
    parts = [f"{done} segmented"]
    parts += [f"{skipped} skipped (results are there)"] if skipped else []
    parts += [f"{failed} failed"] if failed else []
    rate = f" ({done / seconds:.1f} files/s)" if done else ""
    return f"{', '.join(parts)} in {seconds:.1f} s{rate}. Results: {output}"
