"""``fdconv bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fdconv_deploy.cli.bench_tables import show
from fdconv_deploy.cli.options import (
    Config,
    Quiet,
    Settings,
    Size,
    Weights,
    parse_settings,
    parse_size,
)
from fdconv_deploy.environment import needed_by
from fdconv_deploy.errors import FDConvError

STDOUT = Path("-")
NATIVE = {None: [], "on": [True], "off": [False], "both": [False, True]}


def bench(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="BUNDLE|CHECKPOINT", help="Bundles' folders and checkpoints."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="Of bundles: auto (the default), tensorrt, onnxruntime-tensorrt, "
            "onnxruntime-cuda, onnxruntime-cpu; of checkpoints: eager (the default), compile, "
            "folded, fused; or all. Repeatable."
        ),
    ] = None,
    native: Annotated[
        Literal["on", "off", "both"] | None,
        typer.Option(
            help="Whether bundles' operators run in C on a CPU; where they are built if not given."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Batch size; those of the bundles if none. Repeatable."),
    ] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,…", help="Requests at a time; 1,2,4 is a sweep.")
    ] = "1",
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="http://…", help="A running service, beside the rest. Repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The service's model, if not its first.")
    ] = None,
    end_to_end: Annotated[
        bool,
        typer.Option("--end-to-end", help="Time from decoded pixels to labels, image by image."),
    ] = False,
    image: Annotated[
        Path | None, typer.Option(help="Run this image instead of packaged ones.")
    ] = None,
    size: Size = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of every target.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Longest time for one batch size, after warming up.")
    ] = 60.0,
    warm_up: Annotated[
        float, typer.Option(min=0, help="Seconds that each target is warmed up for.")
    ] = 0.5,
    agree: Annotated[
        float, typer.Option(min=0, help="A target is steady when three windows agree this closely.")
    ] = 0.03,
    profile: Annotated[
        bool, typer.Option("--profile", help="Add time by layer, on a CPU.")
    ] = False,
    divergence: Annotated[
        bool,
        typer.Option("--divergence", help="Add how far each bundle is from the first, by layer."),
    ] = False,
    fail_under: Annotated[
        float | None,
        typer.Option(metavar="IMAGES/S", help="Exit with 1 if a target is slower than this."),
    ] = None,
    fail_over: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Exit with 1 if a target's median is longer than this."),
    ] = None,
    fail_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="TIMES", help="Exit with 1 if a target takes longer than TIMES the first's."
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the report as JSON; - prints it."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Markdown table; - prints it.")
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write comma-separated values; - prints them."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one page with plots (needs matplotlib)."),
    ] = None,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    quiet: Quiet = False,
) -> None:
    """Time bundles, checkpoints and services side by side."""
    from fdconv_deploy.latency import machine, report
    from fdconv_deploy.latency.interleaving import Schedule
    from fdconv_deploy.latency.measure import (
        add_divergences,
        add_profiles,
        check_divergences,
        measure,
    )
    from fdconv_deploy.latency.targets import RunOptions, expand_targets
    from fdconv_deploy.runtime.backends.threads import available_cores

    outputs = [
        (json_file, report.as_json),
        (markdown, report.markdown),
        (csv, report.csv),
    ]
    # A missing package is reported now, not after minutes of measuring.
    if html is not None:
        with needed_by("The report's page (--html)", "bench"):
            from fdconv_deploy.latency.html import page
        outputs.append((html, page))
    wanted = [(file, render) for file, render in outputs if file is not None]
    check_places([file for file, _ in wanted])
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
        ),
        urls=url or [],
        backends=backend or [],
        batches=batch or [],
        native=NATIVE[native],
    )
    if size and all(target.kind == "bundle" for target in targets):
        raise typer.BadParameter(
            "--size is of checkpoints; a bundle's graphs have the size it was exported at."
        )
    levels = parse_levels(concurrency)
    if divergence:
        check_divergences(targets)
    if divergence or (profile and any(target.kind == "bundle" for target in targets)):
        with needed_by("Time and divergence by layer"):
            import onnx  # noqa: F401
    err = Console(stderr=True)
    if not quiet and (sentence := machine.busy()):
        err.print(sentence, highlight=False)
    with _progress(err, hidden=quiet) as bar:
        task = bar.add_task("starting", total=1.0)

        def on_progress(text: str, share: float) -> None:
            bar.update(task, description=text, completed=share)

        schedule = Schedule(seconds=seconds, warm_up=warm_up, agree=agree)
        found = measure(
            targets, schedule, concurrency=levels, skipped=skipped, progress=on_progress
        )
        if profile:
            add_profiles(found, targets, on_progress)
        if divergence:
            add_divergences(found, targets, on_progress)
    for file, render in wanted:
        write(file, render(found))
    if not quiet and STDOUT not in [file for file, _ in wanted]:
        show(found, Console())
    broken = list(report.broken_limits(found, fail_under, fail_over, fail_ratio))
    if broken:
        raise FDConvError("\n".join(["too slow.", *broken]))


def parse_levels(text: str) -> list[int]:
    """``"1,2,4"`` -> [1, 2, 4]."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--concurrency is numbers such as 1,2,4; not {text!r}.")
    return list(dict.fromkeys(int(part) for part in parts))


def check_places(files: list[Path]) -> None:
    """Refuse files that could not be written, before minutes are spent.

    Raises:
        FDConvError: a folder is missing, or two outputs are one file.
    """
    for file in files:
        if file != STDOUT and not file.parent.is_dir():
            raise FDConvError(f"{file} cannot be written: there is no folder {file.parent}.")
        if files.count(file) > 1:
            raise FDConvError(f"Two outputs would be written to {file}. Give each its own.")


def write(file: Path, text: str) -> None:
    """Write a file whole, or print it for ``-``."""
    from fdconv_deploy.atomic_write import write_atomically

    if file == STDOUT:
        print(text, end="")
    else:
        write_atomically(file, text.encode())


def _progress(console: Console, *, hidden: bool) -> Progress:
    return Progress(
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        disable=hidden,
        transient=True,
    )
