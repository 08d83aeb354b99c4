"""``fdconv evaluate``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
    column_names,
    parse_scales,
    parse_settings,
    print_operators,
)

if TYPE_CHECKING:
    from fdconv_deploy.evaluation.coco import AveragePrecision
    from fdconv_deploy.evaluation.coco_annotations import Annotations
    from fdconv_deploy.evaluation.compare import (
        DetectionEvaluation,
        Evaluation,
        PanopticEvaluation,
        Target,
        Timed,
    )

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
    from fdconv_deploy.evaluation.targets import open_targets

    labels = masks or annotations
    if (data is None) == (images is None) or (images is None) != (labels is None):
        raise typer.BadParameter(
            "give --images with --masks (or with --annotations, of a detector, or with both, of a "
            "panoptic network), or --data alone."
        )
    panoptic = annotations is not None and masks is not None
    if annotations is not None and images is not None and not panoptic:
        coco: tuple[Path, Path] | None = annotations, images
    else:
        coco = find_coco(data) if data is not None else None
    if coco is not None or panoptic:
        given: dict[str, object] = {"mode": mode, "fit": fit, "label-map": label_map}
        given["reduce-zero-label"] = reduce_zero_label or None
        given |= {"multi-scale": multi_scale, "flip": flip or None}
        for name, value in given.items():
            if value is not None:
                raise typer.BadParameter(f"--{name} is of segmentors, which are scored on masks.")
    paths = [network, *(against or [])]
    opened = open_targets(
        paths,
        detectors=coco is not None,
        panoptic=panoptic,
        mode=mode,
        fit=fit,
        backend=backend,
        threads=threads,
        config=config,
        overrides=parse_settings(settings),
        weights=weights,
        scales=parse_scales(multi_scale, flip),
    )
    if panoptic:
        assert annotations is not None
        assert images is not None
        assert masks is not None
        files = annotations, masks, images
        first = _evaluate_panoptic(opened, files, limit, quiet, as_json)
    elif coco is not None:
        first = _evaluate_detectors(opened, coco, limit, quiet, as_json)
    else:
        first = _evaluate_segmentors(
            opened, data, images, masks, limit, quiet, as_json,
            label_map=label_map, reduce_zero_label=reduce_zero_label, ignore_index=ignore_index,
        )  # fmt: skip
    if not (quiet or as_json):
        _verify(paths, first, config, settings, weights)


def _evaluate_segmentors(
    opened: AbstractContextManager[list[Target[Any]]],
    data: Path | None,
    images: Path | None,
    masks: Path | None,
    limit: int | None,
    quiet: bool,
    as_json: bool,
    **labels: Any,
) -> Path:
    """Score, print, and give the first image's file."""
    from fdconv_deploy.evaluation.compare import evaluate as score
    from fdconv_deploy.evaluation.datasets import find_pairs, labelled_samples, layout_of

    if data is not None:
        images, masks = layout_of(data)
    assert images is not None
    assert masks is not None
    pairs = find_pairs(images, masks)[:limit]
    with opened as targets, _progress(hidden=quiet or as_json) as bar:
        samples, notes = labelled_samples(
            pairs,
            targets[0].classes,
            targets[0].preprocessing,
            data=data,
            **labels,
            progress=_counting(bar, "masks", len(pairs)),
        )
        if not quiet:
            for note in notes:
                bar.console.print(note, markup=False, highlight=False, soft_wrap=True)
        result = score(targets, samples, progress=_counting(bar, "images", len(pairs)))
    if as_json:
        where = {"images_from": str(images), "masks_from": str(masks), "notes": notes}
        print(json.dumps({**where, **result.as_dict()}, indent=2))
    else:
        show_segmentors(result, Console(), quiet)
    return pairs[0].image


def _evaluate_detectors(
    opened: AbstractContextManager[list[Target[Any]]],
    coco: tuple[Path, Path],
    limit: int | None,
    quiet: bool,
    as_json: bool,
) -> Path:
    """Score, print, and give the first image's file."""
    import pycocotools.mask  # noqa: F401 - reported as missing now, not after the last image

    from fdconv_deploy.evaluation.coco import read_coco
    from fdconv_deploy.evaluation.compare import evaluate_detectors

    data = read_coco(*coco, limit)
    if not quiet:
        announce(data.checked, Console(stderr=True))
    with opened as targets, _progress(hidden=quiet or as_json) as bar:
        result = evaluate_detectors(targets, data, progress=_counting(bar, "images", len(data)))
    if as_json:
        where = {"annotations_from": str(coco[0]), "images_from": str(coco[1])}
        print(json.dumps({**where, **result.as_dict()}, indent=2))
    else:
        show_detectors(result, Console(), quiet)
    return data.images / next(iter(data)).name


def _evaluate_panoptic(
    opened: AbstractContextManager[list[Target[Any]]],
    files: tuple[Path, Path, Path],
    limit: int | None,
    quiet: bool,
    as_json: bool,
) -> Path:
    """Score, print, and give the first image's file."""
    from fdconv_deploy.evaluation.compare import evaluate_panoptic
    from fdconv_deploy.evaluation.panoptic import PanopticSet
    from fdconv_deploy.runtime.segmentation import VOID

    with opened as targets, _progress(hidden=quiet or as_json) as bar:
        classes = [name for name in targets[0].classes if name != VOID]
        data = PanopticSet(*files, classes, limit)
        result = evaluate_panoptic(targets, data, progress=_counting(bar, "images", len(data)))
    if as_json:
        names = ("annotations_from", "masks_from", "images_from")
        where = dict(zip(names, map(str, files), strict=True))
        print(json.dumps({**where, **result.as_dict()}, indent=2))
    else:
        show_panoptic(result, Console(), quiet)
    return data.first


def _verify(
    paths: list[Path],
    image: Path,
    config: Path | None,
    settings: list[str] | None,
    weights: str | None,
) -> None:
    """Verify each bundle beside its own checkpoint, as `fdconv verify` does, on an image."""
    from fdconv_deploy.checkpoints.shards import digest_of
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


_ROWS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "AP small": "small",
    "AP medium": "medium",
    "AP large": "large",
    "recall, 100 an image": "recall",
}


def show_segmentors(result: Evaluation, console: Console, quiet: bool) -> None:
    """IoU by class, and means."""
    results = result.results
    names = _columns(results)
    if not quiet:
        table = Table("IoU by class", *names)
        for index, name in enumerate(results[0].target.classes):
            table.add_row(name, *(_text(one.scores.iou[index]) for one in results))
        console.print(table)
    table = Table(f"{result.images} images", *names)
    rows = {
        "mIoU": [f"{one.scores.mean_iou:.4f}" for one in results],
        "pixel accuracy": [f"{one.scores.pixel_accuracy:.4f}" for one in results],
        "mean class accuracy": [f"{one.scores.mean_accuracy:.4f}" for one in results],
        "images/s": [f"{one.images_per_second:.2f}" for one in results],
    }
    if len(results) > 1:
        rows["same class as the first"] = [f"{share:.4%}" for share in result.agreement]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    print_operators(console, [one.target for one in results])


def show_detectors(result: DetectionEvaluation, console: Console, quiet: bool) -> None:
    """AP by class, means, and how many annotations do not count."""
    results = result.results
    names = _columns(results)
    kinds: dict[str, list[AveragePrecision | None]] = {
        "box": [one.boxes for one in results],
        "mask": [one.masks for one in results],
    }
    shown = {kind: scores for kind, scores in kinds.items() if any(scores)}
    if not quiet:
        table = Table("AP by class", *names)
        for index, name in enumerate(results[0].target.classes):
            for kind, scores in shown.items():
                values = [None if s is None else s.classes[index] for s in scores]
                table.add_row(f"{name}, {kind}", *map(_text, values))
        console.print(table)
    crowds = f", {result.crowds} of them crowds" if result.crowds else ""
    table = Table(f"{result.images} images, {result.objects} objects{crowds}", *names)
    for kind, scores in shown.items():
        for title, field in _ROWS.items():
            values = [None if s is None else getattr(s, field) for s in scores]
            table.add_row(f"{kind} {title}", *map(_text, values))
    table.add_row("images/s", *(f"{one.images_per_second:.2f}" for one in results))
    if len(results) > 1:
        table.add_row("same objects as the first", *(f"{one.agreement:.4%}" for one in results))
    console.print(table)
    if closing := _closing(result.checked):
        console.print(closing, markup=False, highlight=False, soft_wrap=True)
    print_operators(console, [one.target for one in results])


def show_panoptic(result: PanopticEvaluation, console: Console, quiet: bool) -> None:
    """PQ by class, and means."""
    results = result.results
    names = _columns(results)
    if not quiet:
        table = Table("PQ by class", *names)
        for index, seen in enumerate(results[0].counts.seen):
            values = [one.counts.by_class()[index, 0] if seen else None for one in results]
            table.add_row(results[0].target.classes[index], *map(_text, values))
        console.print(table)
    table = Table(f"{result.images} images", *names)
    for kind in ("all", "things", "stuff"):
        for name in ("pq", "sq", "rq"):
            values = [getattr(one.qualities[kind], name) for one in results]
            table.add_row(f"{name.upper()}, {kind}", *map(_text, values))
    table.add_row("images/s", *(f"{one.images_per_second:.2f}" for one in results))
    if len(results) > 1:
        table.add_row("same class as the first", *(f"{one.agreement:.4%}" for one in results))
    console.print(table)
    print_operators(console, [one.target for one in results])


def announce(checked: Annotations, console: Console) -> None:
    """Name what is left out of the scores, and what is odd, before anything is run."""
    for title, findings, most in (
        ("left out", checked.left_out, _NAMED),
        ("counted, but odd", checked.noted, _ODD),
    ):
        for finding in findings[:most]:
            console.print(f"{title}: {finding}", markup=False, highlight=False, soft_wrap=True)
        if len(findings) > most:
            rest = f"{title}: {len(findings) - most} more, which --json lists."
            console.print(rest, markup=False, highlight=False)


def _closing(checked: Annotations) -> str:
    from fdconv_deploy.evaluation.coco_annotations import counted

    kinds = {"Left out": checked.left_out, "Counted as COCO's code does it": checked.noted}
    parts = [
        f"{title}: {', '.join(counted(findings))}" for title, findings in kinds.items() if findings
    ]
    return "; ".join(parts) + "." if parts else ""


def _columns(results: Sequence[Timed[Any]]) -> list[str]:
    details = [one.target.details for one in results]
    shown = ("backend", "precision", "mode")
    return column_names(
        [one.target.name for one in results],
        [", ".join(one[key] for key in shown if key in one) for one in details],
    )


def _text(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"
