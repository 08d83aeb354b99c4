"""``fdconv evaluate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fdconv_deploy.cli.evaluate_detectors import announce, coco_folders
from fdconv_deploy.cli.evaluate_detectors import show as show_detection
from fdconv_deploy.cli.options import (
    Config,
    Json,
    Quiet,
    Settings,
    Weights,
    column_names,
    parse_settings,
    print_operators,
)
from fdconv_deploy.errors import FDConvError

if TYPE_CHECKING:
    from fdconv_deploy.evaluation.compare import Evaluation, Labels
    from fdconv_deploy.evaluation.datasets import Pair, Samples
    from fdconv_deploy.evaluation.interleaving import Side
    from fdconv_deploy.runtime.manifest import Fit
    from fdconv_deploy.runtime.segmentation import Mode


def evaluate(
    network: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE|CHECKPOINT", help="A bundle's folder, or a checkpoint."),
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of their masks.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="An ADE20K, Cityscapes or COCO folder as unpacked, in place of both."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO's JSON of a detector's objects, in place of --masks."),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="BUNDLE|CHECKPOINT",
            help="Another one, beside it; checkpoints run in PyTorch. Repeatable.",
        ),
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
        int | None,
        typer.Option(
            min=0,
            help="Pixels of this class are not counted. [default: 255]",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="whole|slide", help="If not as the network was tested."),
    ] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="stretch|pad", help="If not as the bundle says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many images.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, of all sides.")] = None,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    backend: Annotated[
        str | None, typer.Option(help="Of bundles: auto, onnxruntime-cpu or onnxruntime-cuda.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a network on labelled images: mIoU, accuracy and throughput in one run.

    A detector: box and mask AP, by COCO's own code, on objects annotated as COCO's are.
    """
    from fdconv_deploy.evaluation.targets import open_sides
    from fdconv_deploy.evaluation.compare import evaluate as run
    from fdconv_deploy.evaluation.datasets import find_pairs, layout_of

    for name, value, known in (
        ("mode", mode, ("whole", "slide")),
        ("fit", fit, ("stretch", "pad")),
    ):
        if value not in (None, *known):
            raise typer.BadParameter(f"--{name} is {' or '.join(known)}, not {value!r}.")
    labels = masks or annotations
    if (
        (data is None) == (images is None)
        or (images is None) != (labels is None)
        or (masks and annotations)
    ):
        raise typer.BadParameter(
            "give --images with --masks (or with --annotations, of a detector), or --data alone."
        )
    coco = coco_folders(data, annotations, images)
    if coco is not None:
        _refuse(
            mode=mode, fit=fit, label_map=label_map, reduce_zero_label=reduce_zero_label or None
        )
        _evaluate_detectors(
            [network, *(against or [])],
            coco,
            limit=limit,
            backend=backend,
            threads=threads,
            config=config,
            settings=settings,
            weights=weights,
            quiet=quiet,
            as_json=as_json,
        )
        return
    if data is not None:
        images, masks = layout_of(data)
    assert images is not None
    assert masks is not None
    pairs = find_pairs(images, masks)[:limit]
    with (
        open_sides(
            [network, *(against or [])],
            mode=cast("Mode | None", mode),
            fit=cast("Fit | None", fit),
            backend=backend,
            threads=threads,
            config=config,
            overrides=parse_settings(settings),
            weights=weights,
        ) as sides,
        _progress(hidden=quiet or as_json) as bar,
    ):
        samples, notes = _labelled(
            pairs,
            sides[0],
            data,
            label_map,
            reduce_zero_label,
            ignore_index,
            _counting(bar, "masks", len(pairs)),
        )
        if not quiet:
            for note in notes:
                bar.console.print(note, markup=False, highlight=False, soft_wrap=True)
        result = run(sides, samples, progress=_counting(bar, "images", len(pairs)))
    if as_json:
        where = {"images_from": str(images), "masks_from": str(masks), "notes": notes}
        print(json.dumps({**where, **result.as_dict()}, indent=2))
    else:
        _show(result, Console(), quiet)
        if not quiet:
            path = pairs[0].image
            _verify([network, *(against or [])], path, config, settings, weights)


def _verify(
    paths: list[Path],
    image: Path,
    config: Path | None,
    settings: list[str] | None,
    weights: str | None,
) -> None:
    """Say of a bundle beside its own checkpoint what `fdconv verify` says on an image."""
    from fdconv_deploy.checkpoints.shards import digest_of
    from fdconv_deploy.runtime.bundle import Bundle

    for bundle in (path for path in paths if path.is_dir()):
        source = Bundle.open(bundle).manifest.checkpoint
        for checkpoint in (path for path in paths if path.is_file()):
            if source is None or source.sha256 != digest_of(checkpoint):
                continue
            from fdconv_deploy.export.validation.verify import verify_files

            found = verify_files(
                bundle,
                checkpoint,
                [image],
                config=config,
                overrides=parse_settings(settings),
                weights=weights,
            )
            print(f"{bundle} beside {checkpoint}:")
            for verdict in found.verdicts:
                print(*verdict.sentences(), sep="\n")


def _labelled(
    pairs: list[Pair],
    side: Side[Labels],
    data: Path | None,
    label_map: Path | None,
    reduce_zero_label: bool,
    ignore_index: int | None,
    progress: Callable[[int], None],
) -> tuple[Samples, list[str]]:
    """The samples, once every mask has been read, and what there is to say about their labels."""
    from fdconv_deploy.evaluation.class_mapping import (
        CITYSCAPES,
        IGNORE_INDEX,
        LabelRule,
        class_order,
        read_label_map,
    )
    from fdconv_deploy.evaluation.datasets import Samples, binary_map, names_of

    classes = side.classes
    mapping = read_label_map(label_map, classes) if label_map else None
    order, notes = None, []
    if mapping is None:
        ids = any(pair.city_ids for pair in pairs)
        table = ("Cityscapes", CITYSCAPES) if ids else names_of(data) if data else None
        try:
            order = class_order(classes, table[1], table[0]) if table else None
        except FDConvError as error:
            if ids:
                raise FDConvError(
                    f"{error} The masks hold Cityscapes' label ids: say by a --label-map what "
                    "they stand for."
                ) from None
            notes.append(f"{error} The masks' numbers are taken for the network's classes.")
        if table and order:
            notes.append(
                f"The network has {table[0]}'s classes in another order: they are matched by name."
            )
    rule = LabelRule(
        len(classes),
        mapping,
        reduce_zero_label,
        IGNORE_INDEX if ignore_index is None else ignore_index,
        order,
    )
    samples = Samples(pairs, rule, side.preprocessing)
    numbers = samples.numbers(progress)
    if mapping is None and ignore_index is None and not reduce_zero_label:
        black_and_white = binary_map(numbers, len(classes))
        if black_and_white:
            notes.append(
                "The masks hold 0 and 255 alone, black and white: they are taken for the classes "
                f"{classes[0]!r} and {classes[1]!r}. Say --ignore-index 255 if 255 is to be "
                "ignored."
            )
            rule = replace(rule, label_map=black_and_white)
            return Samples(pairs, rule, side.preprocessing), notes
    samples.check(numbers)
    return samples, notes


def _evaluate_detectors(
    paths: list[Path],
    coco: tuple[Path, Path],
    *,
    limit: int | None,
    backend: str | None,
    threads: int | None,
    config: Path | None,
    settings: list[str] | None,
    weights: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    import pycocotools.mask  # noqa: F401 - said to be missing now, not after the last image

    from fdconv_deploy.evaluation.targets import open_detection_sides
    from fdconv_deploy.evaluation.coco import read_coco
    from fdconv_deploy.evaluation.compare_detectors import evaluate_detectors

    data = read_coco(*coco, limit)
    if not quiet:
        announce(data.checked, Console(stderr=True))
    with (
        open_detection_sides(
            paths,
            backend=backend,
            threads=threads,
            config=config,
            overrides=parse_settings(settings),
            weights=weights,
        ) as sides,
        _progress(hidden=quiet or as_json) as bar,
    ):
        result = evaluate_detectors(sides, data, progress=_counting(bar, "images", len(data)))
    if as_json:
        where = {"annotations_from": str(coco[0]), "images_from": str(coco[1])}
        print(json.dumps({**where, **result.as_dict()}, indent=2))
    else:
        show_detection(result, Console(), quiet)
        if not quiet:
            first = data.images / next(iter(data)).name
            _verify(paths, first, config, settings, weights)


def _refuse(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} is of segmentors, which are scored on masks."
            )


def _progress(*, hidden: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=hidden,
        transient=True,
    )


def _counting(bar: Progress, what: str, total: int) -> Callable[[int], None]:
    task = bar.add_task(what, total=total)
    return lambda done: bar.update(task, completed=done)


def _show(result: Evaluation, console: Console, quiet: bool) -> None:
    sides = result.results
    names = column_names(
        [side.side.name for side in sides],
        [
            f"{side.side.details['backend']}, {side.side.details['precision']}, "
            f"{side.side.details['mode']}"
            for side in sides
        ],
    )
    if not quiet:
        table = Table("IoU by class", *names)
        for index, name in enumerate(sides[0].side.classes):
            values = [side.scores.iou[index] for side in sides]
            table.add_row(name, *("–" if v != v else f"{v:.4f}" for v in values))
        console.print(table)
    table = Table(f"{result.images} images", *names)
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
    print_operators(console, [side.side for side in sides])
