"""``fdconv segment``."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fdconv_deploy.cli.options import (
    Backend,
    BundlePath,
    Factors,
    Fit,
    Flip,
    Quiet,
    how_it_ran,
    parse_scales,
    ran_by,
)
from fdconv_deploy.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdconv_deploy.runtime.result_files import Result


def segment(
    bundle: BundlePath,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Images and videos; folders, searched with their subfolders; quoted patterns "
            "such as 'data/**/*.jpg'; .txt files that list one path a line. With --ray also "
            "s3://, gs:// and abfs://.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Folder for the results; mirrors the folders of the inputs."
        ),
    ],
    fit: Fit = None,
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
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Divide images among the workers of a Ray cluster: auto or HOST:PORT; "
            "local starts Ray on this machine.",
        ),
    ] = None,
    ray_cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs and threads of each worker. [default: 4]")
    ] = None,
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
    if ray_cpus is not None and ray is None:
        raise typer.BadParameter("--ray-cpus is for --ray.")
    from fdconv_deploy.runtime import open_session
    from fdconv_deploy.runtime.detection import SHOWN_SCORE
    from fdconv_deploy.runtime.input_files import sources_at
    from fdconv_deploy.runtime.ray_data import RaySegmentation, is_url, local_path
    from fdconv_deploy.runtime.result_files import Failure, ResultOptions, segment_files

    scales = parse_scales(multi_scale, flip)
    for text in (*inputs, output) if ray is None else ():
        if is_url(text):
            raise ImageError(f"{text} is read and written with --ray only, e.g. --ray local.")
    on_ray = None if ray is None else RaySegmentation(bundle, inputs, output)
    sources = on_ray.sources if on_ray else sources_at(map(local_path, inputs), local_path(output))
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
    place = str(on_ray.folder) if on_ray else output
    skipped: list[PurePath] = []
    failed: list[str] = []
    done, start = 0, time.perf_counter()
    console, out = Console(stderr=True), sys.stdout
    frame = console.status("", spinner="dots")

    def fail(failure: Failure) -> None:
        message = failure.error.command_line or str(failure.error)
        failed.append(message)
        if as_json:
            told = {"image": str(failure.path), "error": message}
            print(json.dumps(told), file=out, flush=True)
        console.print(f"[yellow]Skipped:[/] {escape(message)}", soft_wrap=True, highlight=False)

    def show(path: PurePath, frames: int, expected: int | None) -> None:
        frame.start()
        of = f" of {expected}" if expected else ""
        frame.update(escape(f"{path}: frame {frames}{of}"))

    with ExitStack() as stack:
        stack.callback(frame.stop)
        if on_ray:  # Ray prints what it has to say of its workers
            stack.enter_context(redirect_stdout(sys.stderr))
        session = on_ray.session if on_ray else stack.enter_context(open_session(bundle, backend))
        if session.detects and scales is not None:
            raise typer.BadParameter("--multi-scale and --flip are for segmentors.")
        if session.detects and fit is not None:
            raise typer.BadParameter(
                "--fit is for segmentors; a detector's images keep their aspect ratio and are "
                "padded, as published."
            )
        if not session.detects and min_score is not None:
            raise typer.BadParameter("--min-score is for detectors; this is a segmentor.")
        results: Iterator[Result | Failure]
        if on_ray and ray:
            results = on_ray.run(ray, backend, options, ray_cpus, skipped.append)
        else:
            results = segment_files(
                session,
                sources,
                local_path(output),
                options,
                skipped=skipped.append,
                progress=show,
            )
        last: Result | None = None
        for result in results:
            frame.stop()
            if isinstance(result, Failure):
                fail(result)
                continue
            last, done = result, done + 1
            if as_json:
                how = {**how_it_ran(result), **(scales.as_dict() if scales else {})}
                print(json.dumps({**result.record, **how}), file=out, flush=True)
            elif not quiet:
                total = len(sources) - len(skipped)
                print(f"[{done + len(failed)}/{total}] {result.line}", file=out, flush=True)
        if not (as_json or quiet):
            seconds = time.perf_counter() - start
            print(_summary(done, len(skipped), len(failed), seconds, place), file=out)
            if last:
                print(ran_by(last), file=out)
    if failed:
        raise ImageError(
            f"{len(failed)} of {len(sources)} files could not be segmented; the first: {failed[0]}"
        )


def _summary(done: int, skipped: int, failed: int, seconds: float, output: str) -> str:
    """The closing line: how many files went how, in what time, and where results are."""
    parts = [f"{done} segmented"]
    parts += [f"{skipped} skipped (results exist)"] if skipped else []
    parts += [f"{failed} failed"] if failed else []
    rate = f" ({done / seconds:.1f} files/s)" if done else ""
    return f"{', '.join(parts)} in {seconds:.1f} s{rate}. Results: {output}"
