"""``fdconv evaluate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from fdconv_deploy.cli.options import (
    Config,
    Factors,
    Fit,
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
    from fdconv_deploy.evaluation.compare import Evaluation


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
            min=0, help="Pixels of this class are not counted. [default: 255]", show_default=False
        ),
    ] = None,
    mode: Annotated[
        Literal["whole", "slide"] | None,
        typer.Option(help="Inference mode, if other than the network's."),
    ] = None,
    fit: Fit = None,
    multi_scale: Factors = None,
    flip: Flip = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N images.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of every target.")] = None,
    config: Config = None,
    settings: Settings = None,
    weights: Weights = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend of bundles, such as onnxruntime-cpu. Default: auto.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a network on labelled images: mIoU, accuracy and throughput in one run.

    A detector: box and mask AP, by COCO's own code, on objects annotated as COCO's are. A
    panoptic network: PQ, by COCO's rule, or box and mask AP of its objects.
    """
    from fdconv_deploy.evaluation.coco import CocoSet, find_coco, read_coco
    from fdconv_deploy.evaluation.compare import evaluate as score
    from fdconv_deploy.evaluation.datasets import Samples, find_pairs, labelled_samples, layout_of
    from fdconv_deploy.evaluation.networks import open_targets
    from fdconv_deploy.evaluation.panoptic import PanopticSet

    labels = masks or annotations
    if (data is None) == (images is None) or (images is None) != (labels is None):
        raise typer.BadParameter(
            "give --images with --masks (or with --annotations, of a detector, or with both, of a "
            "panoptic network), or --data alone."
        )
    found = find_coco(data) if data else None
    annotations, images = found or (annotations, images)
    if annotations:
        given = {"mode": mode, "fit": fit, "label-map": label_map, "multi-scale": multi_scale,
                 "reduce-zero-label": reduce_zero_label, "flip": flip}  # fmt: skip
        for name, value in given.items():
            if value:
                raise typer.BadParameter(f"--{name} is of segmentors, which are scored on masks.")
    elif data:
        images, masks = layout_of(data)
    assert images
    paths = [network, *(against or [])]
    how: dict[str, Any] = dict(config=config, overrides=parse_settings(settings), weights=weights)
    samples: CocoSet | PanopticSet | Samples
    columns, hidden = (*Progress.get_default_columns(), MofNCompleteColumn()), quiet or as_json
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as bar:
        # What needs no network is read before any is loaded.
        if annotations and not masks:
            import pycocotools.mask  # noqa: F401 - reported as missing before images are run

            samples = read_coco(annotations, images, limit)
        elif masks and not annotations:
            pairs = find_pairs(images, masks)[:limit]
        with open_targets(
            paths,
            "labels" if not annotations else "segments" if masks else "objects",
            mode=mode,
            fit=fit,
            backend=backend,
            threads=threads,
            **how,
            scales=parse_scales(multi_scale, flip),
        ) as targets:
            first = targets[0]
            if annotations and masks:
                samples = PanopticSet(annotations, masks, images, first.classes, limit)
            elif masks:
                samples = labelled_samples(
                    pairs,
                    first.classes,
                    first.preprocessing,
                    data=data,
                    label_map=label_map,
                    reduce_zero_label=reduce_zero_label,
                    ignore_index=ignore_index,
                    progress=_counting(bar, "masks", len(pairs)),
                )
            for note in () if quiet else samples.notes:
                say(note, bar.console)
            result = score(targets, samples, progress=_counting(bar, "images", len(samples)))
    if as_json:
        folders = {"annotations": annotations, "images": images, "masks": masks}
        report = {f"{name}_from": str(path) for name, path in folders.items() if path}
        print(json.dumps({**report, **result.as_dict()}, indent=2))
        return
    show(result, Console(), quiet)
    if isinstance(samples, CocoSet) and (closing := samples.checked.closing()):
        say(closing)
    for target in targets:
        if operators := target.details.get("operators"):
            say(f"{target.name}: {operators}.")
    if not quiet:
        _verify(paths, samples.first, **how)


def _verify(paths: list[Path], image: Path, **how: Any) -> None:
    """Verify each bundle beside its own checkpoint, as `fdconv verify` does, on an image."""
    for bundle, checkpoint in product(filter(Path.is_dir, paths), filter(Path.is_file, paths)):
        from fdconv_deploy.checkpoints.reading import digest_of
        from fdconv_deploy.export.validation.verify import load_exported, verify_bundle
        from fdconv_deploy.runtime import open_session

        with open_session(bundle) as session:
            source = session.bundle.manifest.checkpoint
            if source is None or source.sha256 != digest_of(checkpoint):
                continue
            network = load_exported(session, checkpoint, **how)
            picture = session.read_image(image)
            print(f"{bundle} beside {checkpoint}:")
            for verdict in verify_bundle(session, network, [(image.name, picture)]):
                print(*verdict.sentences(), sep="\n")


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
_MEANS: dict[str, dict[str, str]] = {
    "IoU": {
        "mIoU": "mean_iou",
        "pixel accuracy": "pixel_accuracy",
        "mean class accuracy": "mean_accuracy",
    },
    "AP": {
        f"{kind} {title}": f"{kind}.{field}"
        for kind in ("box", "mask")
        for title, field in _PRECISIONS.items()
    },
    "PQ": {
        f"{name.upper()}, {kind}": f"panoptic.{kind}.{name}"
        for kind in ("all", "things", "stuff")
        for name in ("pq", "sq", "rq")
    },
}


def show(result: Evaluation, console: Console, quiet: bool) -> None:
    """Print scores by class, and means, of all targets side by side."""
    from fdconv_deploy.latency.report import flat

    report, score = result.as_dict(), result.results[0].score
    sides: list[dict[str, Any]] = report["sides"]
    scores = [dict(flat(side)) for side in sides]

    def add_row(table: Table, name: str, field: str) -> None:
        """What is in a field of each side's report, if it is in one."""
        if any(field in one for one in scores):
            values = [one.get(field) for one in scores]
            table.add_row(name, *("–" if value is None else f"{value:.4f}" for value in values))

    names = [Path(side["name"]).name for side in sides]
    if len(set(names)) < len(names):
        names = [side["name"] for side in sides]
    for index, side in enumerate(sides):
        shown = (side[key] for key in ("backend", "precision", "mode") if key in side)
        names[index] += f"\n{', '.join(shown)}"
    if not quiet:
        table = Table(f"{score.measure} by class", *names)
        # A panoptic network's last class is that of what is in no segment.
        scored = sides[0]["classes"][: -1 if score.measure == "PQ" else None]
        for number, one in enumerate(scored, 1):
            for kind, key in _CLASSES[score.measure].items():
                add_row(table, one["name"] + kind, f"classes {number}.{key}")
        console.print(table)
    title = f"{result.images} images"
    if "objects" in report:
        crowds = f", {report['crowds']} of them crowds" if report["crowds"] else ""
        title += f", {report['objects']} objects{crowds}"
    table = Table(title, *names)
    for name, field in _MEANS[score.measure].items():
        add_row(table, name, field)
    table.add_row("images/s", *(f"{side['images_per_second']:.2f}" for side in sides))
    if len(sides) > 1:
        same = (f"{side['agreement']:.4%}" for side in sides)
        table.add_row(f"same {score.unit} as the first", *same)
    console.print(table)
