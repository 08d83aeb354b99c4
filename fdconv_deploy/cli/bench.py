"""``fdconv bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.models import OptionInfo

from fdconv_deploy.cli.options import (
    Config,
    Quiet,
    Settings,
    Weights,
    parse_counts,
    parse_settings,
    parse_size,
)
from fdconv_deploy.environment import needed_by
from fdconv_deploy.errors import FDConvError, UsageError
from fdconv_deploy.ops.native import NCHW, Native

if TYPE_CHECKING:
    from fdconv_deploy.latency.report import Columns, Report

# In a file, where eighty columns are nobody's.
WIDEST = 140
# Layers of a terminal's tables.
SHOWN = 8
# What a terminal without room for all goes without, the first one first; the files have it.
LEFT_OUT = (
    "first ms", "load s", "p99", "runs", "peak MB", "input", "p90", "°C", "W", "J/image", "GPU MB",
    "GPU MHz", "no copies",
)  # fmt: skip
STDOUT = Path("-")
NATIVE: dict[str | None, list[Native]] = {
    None: [], "on": [True], NCHW: [NCHW], "off": [False], "both": [False, True],
}  # fmt: skip


def _file(text: str) -> OptionInfo:
    option: OptionInfo = typer.Option(metavar="FILE", help=f"{text}; - prints it.")
    return option


def bench(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="BUNDLE|CHECKPOINT", help="Bundles' folders and checkpoints."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="Backend of bundles: auto (the default), tensorrt, onnxruntime-cuda, "
            "onnxruntime-cpu, openvino, openvino-bf16; of checkpoints: eager (the default), "
            "compile, folded, fused; all: each of them. Repeatable."
        ),
    ] = None,
    native: Annotated[
        Literal["on", "nchw", "off", "both"] | None,
        typer.Option(
            help="Native operators for bundles on a CPU: on, on with features in NCHW, off, or "
            "on and off. Default: on where they are built."
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(metavar="N,N,…", help="Batch sizes; those of the bundles if none."),
    ] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,…", help="Requests at a time; 1,2,4 is a sweep.")
    ] = "1",
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="http://…", help="A running service to time as well. Repeatable."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The service's, if not its first.")] = None,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let float32 products round to ten bits on a GPU.")
    ] = False,
    end_to_end: Annotated[
        bool,
        typer.Option("--end-to-end", help="Time from decoded pixels to labels, image by image."),
    ] = False,
    image: Annotated[Path | None, typer.Option(help="Run this, not packaged images.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="Input size of checkpoints; of a bundle, one of those it has (else its first).",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of every target.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Longest time for one batch size, after warming up.")
    ] = 60.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds to warm each target up.")] = 0.5,
    agree: Annotated[
        float, typer.Option(min=0, help="A target is steady when three windows agree this closely.")
    ] = 0.03,
    profile: Annotated[bool, typer.Option("--profile", help="Add time by layer (CPU).")] = False,
    divergence: Annotated[
        bool,
        typer.Option("--divergence", help="Add how far each bundle is from the first, by layer."),
    ] = False,
    fail_under: Annotated[
        float | None, typer.Option(metavar="IMAGES/S", help="Exit with 1 if a target is slower.")
    ] = None,
    fail_over: Annotated[
        float | None, typer.Option(metavar="MS", help="Exit with 1 if a target's median is longer.")
    ] = None,
    fail_ratio: Annotated[
        float | None,
        typer.Option(metavar="TIMES", help="Exit with 1 if a target takes TIMES the first's."),
    ] = None,
    json: Annotated[Path | None, _file("Write the report as JSON")] = None,
    markdown: Annotated[Path | None, _file("Write a Markdown table")] = None,
    csv: Annotated[Path | None, _file("Write comma-separated values")] = None,
    html: Annotated[Path | None, _file("Write one page with plots (needs matplotlib)")] = None,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    quiet: Quiet = False,
) -> None:
    """Time bundles, checkpoints and services side by side."""
    from fdconv_deploy.latency import machine, measure, report
    from fdconv_deploy.latency.networks import RunOptions, expand_targets
    from fdconv_deploy.runtime.backends.threads import available_cores

    outputs = [(json, report.as_json), (markdown, report.markdown), (csv, report.csv)]
    # A missing package is reported now, not after minutes of measuring.
    if html is not None:
        with needed_by("The report's page (--html)", "bench"):
            from fdconv_deploy.latency.html import page
        outputs.append((html, page))
    wanted = [(file, render) for file, render in outputs if file is not None]
    files = [file for file, _ in wanted]
    check_places(files)
    targets, skipped = expand_targets(
        paths or [],
        RunOptions(
            threads=threads or available_cores(),
            size=parse_size(size) if size else None,
            whole=end_to_end,
            image=image,
            model=model,
            config=config,
            overrides=parse_settings(settings),
            weights=weights,
            tf32=tf32 or None,
        ),
        urls=url or [],
        backends=backend or [],
        batches=parse_counts(batch, "--batch"),
        native=NATIVE[native],
    )
    levels = parse_counts([concurrency], "--concurrency")
    compared = measure.compared_bundles(targets) if divergence else []
    if divergence or (profile and any(target.kind == "bundle" for target in targets)):
        with needed_by("Time and divergence by layer"):
            import onnx  # noqa: F401
    err = Console(stderr=True)
    if not quiet and (sentence := machine.busy()):
        err.print(sentence, highlight=False)
    columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=err, disable=quiet, transient=True) as shown:
        task = shown.add_task("starting", total=None)

        def on_progress(text: str) -> None:
            shown.update(task, description=text)

        schedule = measure.Schedule(seconds=seconds, warm_up=warm_up, agree=agree)
        found = measure.measure(
            targets, schedule, concurrency=levels, skipped=skipped, progress=on_progress
        )
        if profile:
            measure.add_profiles(found, targets, on_progress)
        measure.add_divergences(found, compared, on_progress)
    for file, render in wanted:
        write(file, render(found))
    if not quiet and STDOUT not in files:
        show(found, Console())
    broken = list(report.broken_limits(found, fail_under, fail_over, fail_ratio))
    if broken:
        raise FDConvError("\n".join(["too slow.", *broken]))


def check_places(files: list[Path]) -> None:
    """Refuse files that could not be written, before minutes are spent."""
    for file in files:
        if file != STDOUT and not file.parent.is_dir():
            raise FDConvError(f"{file} cannot be written: there is no folder {file.parent}.")
        if files.count(file) > 1:
            raise UsageError(f"Two outputs would be written to {file}. Give each its own.")


def write(file: Path, text: str) -> None:
    """Write a file whole, or print it for ``-``."""
    from fdconv_deploy.atomic_write import write_atomically

    if file == STDOUT:
        print(text, end="")
    else:
        write_atomically(file, text.encode())


def show(report: Report, console: Console) -> None:
    """The report as tables and notes.

    Where the console is narrow, targets are numbered and named above their table; columns that
    still find no room are left out, and a caption names them.
    """
    from fdconv_deploy.latency.report import cells, head, notes

    columns, missing = cells(report), []
    console.print(head(report), markup=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDEST)
    unbounded = console.options.update(width=10_000)

    def too_wide() -> bool:
        return console.measure(_table(columns), options=unbounded).maximum > console.width

    if too_wide():
        names = list(dict.fromkeys(columns[""]))
        for number, name in enumerate(names, 1):
            console.print(Text(f"{number}  {name}"))
        columns[""] = [str(names.index(name) + 1) for name in columns[""]]
    for title in LEFT_OUT:
        if title in columns and too_wide():
            missing.append(title)
            del columns[title]
    table = _table(columns)
    if missing:
        table.caption = f"No room for {', '.join(missing)}: --markdown - prints all."
        table.caption_justify = "left"
    console.print(table)
    for section in report.sections:
        console.print(Text(section.heading))
        console.print(_table(section.table(most=SHOWN)))
    for note in notes(report):
        console.print(note, markup=False, highlight=False)


def _table(columns: Columns) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in columns:
        aligned: Literal["right", "left"] = "right" if title else "left"
        table.add_column(title, justify=aligned, no_wrap=bool(title) and " " not in title)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table
