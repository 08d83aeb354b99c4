"""What ``fdconv evaluate`` prints on a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fdconv_deploy.cli.options import column_names, print_operators

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdconv_deploy.evaluation.coco import AveragePrecision
    from fdconv_deploy.evaluation.coco_annotations import Annotations
    from fdconv_deploy.evaluation.compare import DetectionEvaluation, Evaluation, Timed

# How many findings are named in the terminal.
_NAMED, _ODD = 20, 5
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
