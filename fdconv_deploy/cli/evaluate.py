"""``fdconv evaluate``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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
    from fdconv_deploy.evaluation.datasets import layout_of
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
    scored: tuple[Any, dict[str, Any], Path]
    with _progress(hidden=quiet or as_json) as bar:
        if panoptic:
            assert annotations is not None
            assert images is not None
            assert masks is not None
            scored = _panoptic(opened, annotations, masks, images, limit, bar)
        elif coco is not None:
            scored = _detectors(opened, *coco, limit, bar, quiet=quiet)
        else:
            if data is not None:
                images, masks = layout_of(data)
            assert images is not None
            assert masks is not None
            scored = _segmentors(
                opened, images, masks, limit, bar, quiet=quiet, data=data, label_map=label_map,
                reduce_zero_label=reduce_zero_label, ignore_index=ignore_index,
            )  # fmt: skip
    result, where, first = scored
    if as_json:
        print(json.dumps({**where, **result.as_dict()}, indent=2))
        return
    show(result, Console(), quiet)
    if not quiet:
        _verify(paths, first, config, settings, weights)


Opened = AbstractContextManager["list[Target[Any]]"]


def _segmentors(
    opened: Opened,
    images: Path,
    masks: Path,
    limit: int | None,
    bar: Progress,
    *,
    quiet: bool,
    **labels: Any,
) -> tuple[Evaluation, dict[str, Any], Path]:
    """Scores, where they come from, and the first image's file."""
    from fdconv_deploy.evaluation.compare import evaluate as score
    from fdconv_deploy.evaluation.datasets import find_pairs, labelled_samples

    pairs = find_pairs(images, masks)[:limit]
    with opened as targets:
        first = targets[0]
        reading = _counting(bar, "masks", len(pairs))
        samples, notes = labelled_samples(
            pairs, first.classes, first.preprocessing, **labels, progress=reading
        )
        for note in () if quiet else notes:
            bar.console.print(note, markup=False, highlight=False, soft_wrap=True)
        result = score(targets, samples, progress=_counting(bar, "images", len(pairs)))
    where = {"images_from": str(images), "masks_from": str(masks), "notes": notes}
    return result, where, pairs[0].image


def _detectors(
    opened: Opened,
    annotations: Path,
    images: Path,
    limit: int | None,
    bar: Progress,
    *,
    quiet: bool,
) -> tuple[DetectionEvaluation, dict[str, Any], Path]:
    """Scores, where they come from, and the first image's file."""
    import pycocotools.mask  # noqa: F401 - reported as missing now, not after the last image

    from fdconv_deploy.evaluation.coco import read_coco
    from fdconv_deploy.evaluation.compare import evaluate_detectors

    data = read_coco(annotations, images, limit)
    if not quiet:
        announce(data.checked, bar.console)
    with opened as targets:
        result = evaluate_detectors(targets, data, progress=_counting(bar, "images", len(data)))
    where = {"annotations_from": str(annotations), "images_from": str(images)}
    return result, where, data.images / next(iter(data)).name


def _panoptic(
    opened: Opened, annotations: Path, masks: Path, images: Path, limit: int | None, bar: Progress
) -> tuple[PanopticEvaluation, dict[str, Any], Path]:
    """Scores, where they come from, and the first image's file."""
    from fdconv_deploy.evaluation.compare import evaluate_panoptic
    from fdconv_deploy.evaluation.panoptic import PanopticSet
    from fdconv_deploy.runtime.segmentation import VOID

    with opened as targets:
        classes = [name for name in targets[0].classes if name != VOID]
        data = PanopticSet(annotations, masks, images, classes, limit)
        result = evaluate_panoptic(targets, data, progress=_counting(bar, "images", len(data)))
    files = {"annotations_from": annotations, "masks_from": masks, "images_from": images}
    return result, {name: str(path) for name, path in files.items()}, data.first


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


_PRECISIONS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "AP small": "small",
    "AP medium": "medium",
    "AP large": "large",
    "recall, 100 an image": "recall",
}
Rows = list[tuple[str, "list[float | None]"]]  # names of classes need not differ


def show(
    result: Evaluation | DetectionEvaluation | PanopticEvaluation, console: Console, quiet: bool
) -> None:
    """Print scores by class, and means, of all targets side by side."""
    from fdconv_deploy.evaluation.compare import DetectionEvaluation, Evaluation

    results, images = result.results, f"{result.images} images"
    details = [one.target.details for one in results]
    shown = ("backend", "precision", "mode")
    names = column_names(
        [one.target.name for one in results],
        [", ".join(one[key] for key in shown if key in one) for one in details],
    )
    if isinstance(result, Evaluation):
        score, (by_class, means) = "IoU", _segmentor_rows(result)
    elif isinstance(result, DetectionEvaluation):
        score, (by_class, means) = "AP", _detector_rows(result)
        crowds = f", {result.crowds} of them crowds" if result.crowds else ""
        images += f", {result.objects} objects{crowds}"
    else:
        score, (by_class, means) = "PQ", _panoptic_rows(result)
    if not quiet:
        table = Table(f"{score} by class", *names)
        for name, values in by_class:
            table.add_row(name, *map(_text, values))
        console.print(table)
    table = Table(images, *names)
    for name, values in means:
        table.add_row(name, *map(_text, values))
    table.add_row("images/s", *(f"{one.images_per_second:.2f}" for one in results))
    if len(results) > 1:
        what = "objects" if score == "AP" else "class"
        table.add_row(f"same {what} as the first", *(f"{one.agreement:.4%}" for one in results))
    console.print(table)
    if isinstance(result, DetectionEvaluation) and (closing := _closing(result.checked)):
        console.print(closing, markup=False, highlight=False, soft_wrap=True)
    print_operators(console, [one.target for one in results])


def _segmentor_rows(result: Evaluation) -> tuple[Rows, Rows]:
    found = [one.scores for one in result.results]
    classes = enumerate(result.results[0].target.classes)
    return [(name, [one.iou[index] for one in found]) for index, name in classes], [
        ("mIoU", [one.mean_iou for one in found]),
        ("pixel accuracy", [one.pixel_accuracy for one in found]),
        ("mean class accuracy", [one.mean_accuracy for one in found]),
    ]


def _detector_rows(result: DetectionEvaluation) -> tuple[Rows, Rows]:
    kinds: dict[str, list[AveragePrecision | None]] = {
        "box": [one.boxes for one in result.results],
        "mask": [one.masks for one in result.results],
    }
    shown = {kind: scores for kind, scores in kinds.items() if any(scores)}
    return [
        (f"{name}, {kind}", [None if s is None else s.classes[index] for s in scores])
        for index, name in enumerate(result.results[0].target.classes)
        for kind, scores in shown.items()
    ], [
        (f"{kind} {title}", [None if s is None else getattr(s, field) for s in scores])
        for kind, scores in shown.items()
        for title, field in _PRECISIONS.items()
    ]


def _panoptic_rows(result: PanopticEvaluation) -> tuple[Rows, Rows]:
    results = result.results
    names = results[0].target.classes  # the last is "void", of which no segment is
    return [
        (names[index], [one.counts.by_class()[index, 0] if seen else None for one in results])
        for index, seen in enumerate(results[0].counts.seen)
    ], [
        (f"{name.upper()}, {kind}", [getattr(one.qualities[kind], name) for one in results])
        for kind in ("all", "things", "stuff")
        for name in ("pq", "sq", "rq")
    ]


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


def _text(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"
