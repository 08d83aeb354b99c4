"""``fdconv evaluate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fdconv_deploy.cli.options import (
    Config,
    Factors,
    Flip,
    Json,
    Quiet,
    Settings,
    Weights,
    parse_scales,
    parse_settings,
    say,
)

if TYPE_CHECKING:
    from fdconv_deploy.evaluation.coco import CocoSet
    from fdconv_deploy.evaluation.coco_annotations import Annotations
    from fdconv_deploy.evaluation.compare import Evaluation, Target
    from fdconv_deploy.evaluation.datasets import Pair, Samples
    from fdconv_deploy.evaluation.metrics import Score
    from fdconv_deploy.evaluation.panoptic import PanopticSet
    from fdconv_deploy.evaluation.targets import Task

# How many findings are named in the terminal.
_NAMED, _ODD = 20, 5


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
        typer.Option(
            help="COCO's JSON of objects, a detector's or a panoptic network's, in place of "
            "--masks; with --masks, the folder of its PNGs, COCO's panoptic JSON."
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="BUNDLE|CHECKPOINT",
            help="Another one to score on the same images. Checkpoints run in PyTorch. Repeatable.",
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
        Literal["whole", "slide"] | None,
        typer.Option(help="Inference mode, if other than the network's."),
    ] = None,
    fit: Annotated[
        Literal["stretch", "pad"] | None,
        typer.Option(
            help="How images of another aspect ratio are fitted, if other than the bundle's."
        ),
    ] = None,
    multi_scale: Factors = None,
    flip: Flip = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N images.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of every target.")] = None,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Backend of bundles, such as onnxruntime-cpu. Default: auto."),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a network on labelled images: mIoU, accuracy and throughput in one run.

    A detector: box and mask AP, by COCO's own code, on objects annotated as COCO's are. A
    panoptic network: PQ, by COCO's rule, or box and mask AP of its objects.
    """
    from fdconv_deploy.evaluation.coco import find_coco
    from fdconv_deploy.evaluation.compare import evaluate as score
    from fdconv_deploy.evaluation.datasets import find_pairs, layout_of
    from fdconv_deploy.evaluation.targets import open_targets

    labels = masks or annotations
    if (data is None) == (images is None) or (images is None) != (labels is None):
        raise typer.BadParameter(
            "give --images with --masks (or with --annotations, of a detector, or with both, of a "
            "panoptic network), or --data alone."
        )
    coco = find_coco(data) if data else None
    if annotations and images and not masks:
        coco = annotations, images
    if coco or annotations:
        given = {"mode": mode, "fit": fit, "label-map": label_map, "multi-scale": multi_scale,
                 "reduce-zero-label": reduce_zero_label, "flip": flip}  # fmt: skip
        for name, value in given.items():
            if value:
                raise typer.BadParameter(f"--{name} is of segmentors, which are scored on masks.")
    paths = [network, *(against or [])]
    task: Task
    with _progress(hidden=quiet or as_json) as bar:
        # What needs no network is read before any is loaded.
        if coco:
            objects = _objects(*coco, limit)
            task, read = "objects", lambda first: objects
        elif annotations and masks and images:
            task, read = "segments", partial(_segments, annotations, masks, images, limit)
        else:
            if data:
                images, masks = layout_of(data)
            assert images
            assert masks
            pairs = find_pairs(images, masks)[:limit]
            task, read = "labels", partial(
                _labels, images, masks, pairs, _counting(bar, "masks", len(pairs)),
                data=data, label_map=label_map, reduce_zero_label=reduce_zero_label,
                ignore_index=ignore_index,
            )  # fmt: skip
        with open_targets(
            paths,
            task,
            mode=mode,
            fit=fit,
            backend=backend,
            threads=threads,
            config=config,
            overrides=parse_settings(settings),
            weights=weights,
            scales=parse_scales(multi_scale, flip),
        ) as targets:
            found = read(targets[0])
            for line in () if quiet else found.remarks:
                say(line, bar.console)
            counting = _counting(bar, "images", len(found.samples))
            result = score(targets, found.samples, found.score, progress=counting)
    if as_json:
        print(json.dumps({**found.source, **result.as_dict()}, indent=2))
        return
    show(result, Console(), quiet)
    if found.closing:
        say(found.closing)
    for target in targets:
        if operators := target.details.get("operators"):
            say(f"{target.name}: {operators}.")
    if not quiet:
        _verify(paths, found.first, config, settings, weights)


@dataclass
class _Data:
    """What networks are scored on, and how.

    Attributes:
        score: see `compare.evaluate`.
        first: the first image's file.
        source: for JSON: where it comes from.
        remarks: printed before anything is run.
        closing: printed last.
    """

    samples: Samples | CocoSet | PanopticSet
    score: Callable[[tuple[str, ...]], Score]
    first: Path
    source: dict[str, Any]
    remarks: Sequence[str] = ()
    closing: str = ""


def _labels(
    images: Path,
    masks: Path,
    pairs: Sequence[Pair],
    progress: Callable[[int], None],
    target: Target,
    **options: Any,
) -> _Data:
    from fdconv_deploy.evaluation.datasets import labelled_samples
    from fdconv_deploy.evaluation.metrics import SemanticScore

    samples, notes = labelled_samples(
        pairs, target.classes, target.preprocessing, progress=progress, **options
    )
    source = {"images_from": str(images), "masks_from": str(masks), "notes": notes}
    return _Data(samples, SemanticScore, pairs[0].image, source, notes)


def _objects(annotations: Path, images: Path, limit: int | None) -> _Data:
    import pycocotools.mask  # noqa: F401 - reported as missing now, not after the last image

    from fdconv_deploy.evaluation.coco import DetectionScore, read_coco

    data = read_coco(annotations, images, limit)
    return _Data(
        data,
        partial(DetectionScore, data),
        images / data.truth["images"][0]["file_name"],
        {"annotations_from": str(annotations), "images_from": str(images)},
        _remarks(data.checked),
        _closing(data.checked),
    )


def _segments(
    annotations: Path, masks: Path, images: Path, limit: int | None, target: Target
) -> _Data:
    from fdconv_deploy.evaluation.panoptic import PanopticScore, PanopticSet
    from fdconv_deploy.runtime.segmentation import VOID

    classes = [name for name in target.classes if name != VOID]
    data = PanopticSet(annotations, masks, images, classes, limit)
    source = {"annotations_from": annotations, "masks_from": masks, "images_from": images}
    return _Data(
        data,
        lambda _: PanopticScore(data.things),
        data.first,
        {name: str(path) for name, path in source.items()},
    )


def _verify(
    paths: list[Path],
    image: Path,
    config: Path | None,
    settings: list[str] | None,
    weights: str | None,
) -> None:
    """Verify each bundle beside its own checkpoint, as `fdconv verify` does, on an image."""
    from fdconv_deploy.checkpoints.reading import digest_of
    from fdconv_deploy.runtime.bundle import Bundle

    for bundle in (path for path in paths if path.is_dir()):
        source = Bundle.open(bundle).manifest.checkpoint
        for checkpoint in (path for path in paths if path.is_file()):
            if source is None or source.sha256 != digest_of(checkpoint):
                continue
            from fdconv_deploy.export.validation.verify import load_exported, verify_bundle
            from fdconv_deploy.runtime import open_session

            overrides = parse_settings(settings)
            with open_session(bundle) as session:
                network = load_exported(
                    session, checkpoint, config=config, overrides=overrides, weights=weights
                )
                picture = session.read_image(image)
                verdicts = verify_bundle(session, network, [(image.name, picture)])
            print(f"{bundle} beside {checkpoint}:")
            for verdict in verdicts:
                print(*verdict.sentences(), sep="\n")


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


# What a table shows of each side of a report: of its classes, and of all of them together.
_CLASSES: dict[str, dict[str, str]] = {
    "IoU": {"": "iou"},
    "AP": {", box": "box_ap", ", mask": "mask_ap"},
    "PQ": {"": "pq"},
}
_PRECISIONS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "AP small": "small",
    "AP medium": "medium",
    "AP large": "large",
    "recall, 100 an image": "recall",
}
_MEANS: dict[str, dict[str, tuple[str, ...]]] = {
    "IoU": {
        "mIoU": ("mean_iou",),
        "pixel accuracy": ("pixel_accuracy",),
        "mean class accuracy": ("mean_accuracy",),
    },
    "AP": {
        f"{kind} {title}": (kind, field)
        for kind in ("box", "mask")
        for title, field in _PRECISIONS.items()
    },
    "PQ": {
        f"{name.upper()}, {kind}": ("panoptic", kind, name)
        for kind in ("all", "things", "stuff")
        for name in ("pq", "sq", "rq")
    },
}


def show(result: Evaluation, console: Console, quiet: bool) -> None:
    """Print scores by class, and means, of all targets side by side."""
    report, score = result.as_dict(), result.results[0].score
    sides: list[dict[str, Any]] = report["sides"]
    names = [Path(side["name"]).name for side in sides]
    if len(set(names)) < len(names):
        names = [side["name"] for side in sides]
    for index, side in enumerate(sides):
        shown = (side[key] for key in ("backend", "precision", "mode") if key in side)
        names[index] += f"\n{', '.join(shown)}"
    if not quiet:
        table = Table(f"{score.measure} by class", *names)
        for index, one in enumerate(sides[0]["classes"]):
            for kind, key in _CLASSES[score.measure].items():
                _add_row(table, one["name"] + kind, sides, ("classes", index, key))
        console.print(table)
    title = f"{result.images} images"
    if "objects" in report:
        crowds = f", {report['crowds']} of them crowds" if report["crowds"] else ""
        title += f", {report['objects']} objects{crowds}"
    table = Table(title, *names)
    for name, path in _MEANS[score.measure].items():
        _add_row(table, name, sides, path)
    table.add_row("images/s", *(f"{side['images_per_second']:.2f}" for side in sides))
    if len(sides) > 1:
        same = (f"{side['agreement']:.4%}" for side in sides)
        table.add_row(f"same {score.unit} as the first", *same)
    console.print(table)


def _add_row(table: Table, name: str, sides: list[Any], path: tuple[Any, ...]) -> None:
    """A row of what is at a place of each side's report, if it is in one."""
    *parts, key = path
    found = [reduce(lambda at, part: at and at[part], parts, side) for side in sides]
    if any(part and key in part for part in found):
        values = (part and part.get(key) for part in found)
        table.add_row(name, *("–" if value is None else f"{value:.4f}" for value in values))


def _remarks(checked: Annotations) -> list[str]:
    """What is left out of the scores, and what is odd, for the terminal."""
    lines = []
    for title, findings, most in (
        ("left out", checked.left_out, _NAMED),
        ("counted, but odd", checked.noted, _ODD),
    ):
        lines += [f"{title}: {finding}" for finding in findings[:most]]
        if len(findings) > most:
            lines.append(f"{title}: {len(findings) - most} more, which --json lists.")
    return lines


def _closing(checked: Annotations) -> str:
    from fdconv_deploy.evaluation.coco_annotations import counted

    kinds = {"Left out": checked.left_out, "Counted as COCO's code does it": checked.noted}
    parts = [
        f"{title}: {', '.join(counted(findings))}" for title, findings in kinds.items() if findings
    ]
    return "; ".join(parts) + "." if parts else ""
