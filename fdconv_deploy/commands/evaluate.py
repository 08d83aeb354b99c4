"""``fdconv evaluate``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fdconv_deploy.commands.options import (
    Backend,
    Config,
    Json,
    Quiet,
    Settings,
    parse_settings,
)
from fdconv_deploy.errors import FDConvError

if TYPE_CHECKING:
    from fdconv_deploy.benchmark.evaluation import Evaluation, Side


def evaluate(
    network: Annotated[Path, typer.Argument(help="A bundle's folder, or a checkpoint file.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of their masks.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="An ADE20K or Cityscapes folder as unpacked, in place of both."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A checkpoint to run in PyTorch beside it.")
    ] = None,
    reduce_zero_label: Annotated[
        bool,
        typer.Option("--reduce-zero-label", help="Masks count classes from 1, as ADE20K's do."),
    ] = False,
    label_map: Annotated[
        Path | None,
        typer.Option(help="JSON object: a mask's number -> class number or name, or null."),
    ] = None,
    ignore_index: Annotated[
        int, typer.Option(min=0, help="The number of pixels that are not counted.")
    ] = 255,
    mode: Annotated[
        str | None, typer.Option(help="whole or slide, if not as the network was tested.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="stretch or pad, if not as the bundle says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many images.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, of all sides.")] = None,
    config: Config = None,
    settings: Settings = None,
    backend: Backend = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a network on labelled images: mIoU, accuracy and throughput in one run."""
    from fdconv_deploy.benchmark.datasets import Samples, find_pairs, layout_of
    from fdconv_deploy.benchmark.evaluation import evaluate as run
    from fdconv_deploy.benchmark.labels import LabelRule, read_label_map

    for name, value, known in (
        ("mode", mode, ("whole", "slide")),
        ("fit", fit, ("stretch", "pad")),
    ):
        if value not in (None, *known):
            raise typer.BadParameter(f"--{name} is {' or '.join(known)}, not {value!r}.")
    if (data is None) == (images is None) or (images is None) != (masks is None):
        raise typer.BadParameter("give --images and --masks, or --data alone.")
    if data is not None:
        images, masks = layout_of(data)
    assert images is not None
    assert masks is not None
    pairs = find_pairs(images, masks)[:limit]
    console = Console(stderr=True)
    with ExitStack() as stack:
        sides = _sides(
            stack, network, against,
            dict(mode=mode, fit=fit), backend, threads, config, parse_settings(settings),
        )  # fmt: skip
        classes = sides[0].classes
        mapping = read_label_map(label_map, classes) if label_map else None
        rule = LabelRule(len(classes), mapping, reduce_zero_label, ignore_index)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        bar = stack.enter_context(
            Progress(
                *columns,
                TimeRemainingColumn(),
                console=console,
                disable=quiet or as_json,
                transient=True,
            )
        )
        task = bar.add_task("images", total=len(pairs))
        result = run(
            sides, Samples(pairs, rule), progress=lambda done: bar.update(task, completed=done)
        )
    if as_json:
        print(json.dumps({**result.as_dict(), "images_from": str(images)}, indent=2))
    else:
        _show(result, Console(), quiet)


def _sides(
    stack: ExitStack,
    network: Path,
    against: Path | None,
    how: dict[str, Any],
    backend: str,
    threads: int | None,
    config: Path | None,
    overrides: dict[str, Any],
) -> list[Side]:
    from fdconv_deploy.benchmark.evaluation import bundle_side
    from fdconv_deploy.runtime import open_session

    for path in (network, against):
        if path is not None and not path.exists():
            raise FDConvError(f"{path} does not exist. Give a bundle's folder or a checkpoint.")
    sides: list[Side] = []
    size = None
    checkpoints = [against] if against is not None else []
    if network.is_dir():
        session = stack.enter_context(open_session(network, backend, threads=threads))
        size, how = session.input_size, {**how, "fit": how["fit"] or session.bundle.manifest.fit}
        sides.append(bundle_side(session, **how))
    else:
        checkpoints.insert(0, network)
    if checkpoints:
        # Only where a checkpoint is asked for.
        import torch

        from fdconv_deploy.benchmark.torch_side import torch_side
        from fdconv_deploy.checkpoints import load_checkpoint

        if threads is not None:
            torch.set_num_threads(threads)
        how = {**how, "fit": how["fit"] or "stretch"}
        for path in checkpoints:
            loaded = load_checkpoint(path, config=config, overrides=overrides, require_fdconv=False)
            sides.append(torch_side(cast("Any", loaded), path, size=size, **how))
    return sides


def _show(result: Evaluation, console: Console, quiet: bool) -> None:
    sides = result.results
    names = [f"{side.side.name}, {side.side.details['backend']}" for side in sides]
    if not quiet:
        table = Table("IoU by class", *names)
        for index, name in enumerate(sides[0].side.classes):
            values = [side.scores.iou[index] for side in sides]
            table.add_row(name, *("–" if v != v else f"{v:.4f}" for v in values))
        console.print(table)
    table = Table(f"{result.images} images, {sides[0].side.details['mode']}", *names)
    rows = {
        "mIoU": [f"{side.scores.mean_iou:.4f}" for side in sides],
        "pixel accuracy": [f"{side.scores.pixel_accuracy:.4f}" for side in sides],
        "mean class accuracy": [f"{side.scores.mean_accuracy:.4f}" for side in sides],
        "images/s": [f"{side.images_per_second:.2f}" for side in sides],
    }
    if len(sides) > 1:
        rows["same class as the first"] = [f"{share:.4%}" for share in result.agreement]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
