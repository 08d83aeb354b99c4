"""What ``fdconv evaluate`` prints of detectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fdconv_deploy.cli.options import column_names, print_operators

if TYPE_CHECKING:
    from fdconv_deploy.evaluation.coco import AveragePrecision
    from fdconv_deploy.evaluation.coco_annotations import Annotations
    from fdconv_deploy.evaluation.compare import DetectionEvaluation

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


def coco_folders(
    data: Path | None, annotations: Path | None, images: Path | None
) -> tuple[Path, Path] | None:
    """Where annotated objects and their images are; None where masks are scored instead."""
    from fdconv_deploy.evaluation.coco import find_coco

    if annotations is not None and images is not None:
        return annotations, images
    return find_coco(data) if data is not None else None


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


def _closing(checked: Annotations) -> str | None:
    from fdconv_deploy.evaluation.coco_annotations import counted

    parts = [
        f"{title}: {', '.join(counted(findings))}"
        for title, findings in (
            ("Left out", checked.left_out),
            ("Counted as COCO's code does it", checked.noted),
        )
        if findings
    ]
    return "; ".join(parts) + "." if parts else None


def show(result: DetectionEvaluation, console: Console, quiet: bool) -> None:
    """The scores as tables."""
    results = result.results
    names = column_names(
        [one.target.name for one in results],
        [f"{one.target.details['backend']}, {one.target.details['precision']}" for one in results],
    )
    kinds: list[tuple[str, Callable[[int], AveragePrecision | None]]] = [
        ("box", lambda index: results[index].boxes),
        ("mask", lambda index: results[index].masks),
    ]
    shown = [
        (kind, [score(index) for index in range(len(results))])
        for kind, score in kinds
        if any(score(index) for index in range(len(results)))
    ]
    if not quiet:
        table = Table("AP by class", *names)
        for index, name in enumerate(results[0].target.classes):
            for kind, scores in shown:
                values = [None if s is None else s.classes[index] for s in scores]
                table.add_row(f"{name}, {kind}", *map(_text, values))
        console.print(table)
    crowds = f", {result.crowds} of them crowds" if result.crowds else ""
    table = Table(f"{result.images} images, {result.objects} objects{crowds}", *names)
    for kind, scores in shown:
        for title, field in _ROWS.items():
            values = [None if s is None else getattr(s, field) for s in scores]
            table.add_row(f"{kind} {title}", *map(_text, values))
    table.add_row("images/s", *(f"{one.images_per_second:.2f}" for one in results))
    if len(results) > 1:
        table.add_row("same objects as the first", *(f"{one.agreement:.4%}" for one in results))
    console.print(table)
    closing = _closing(result.checked)
    if closing is not None:
        console.print(closing, markup=False, highlight=False, soft_wrap=True)
    print_operators(console, [one.target for one in results])


def _text(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"
