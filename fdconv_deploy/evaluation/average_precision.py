"""Average precision by COCO's own code: ``pycocotools`` (the extra ``coco``)."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fdconv_deploy.evaluation.coco import CocoSet

Kind = Literal["bbox", "segm"]


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's scores, 0 to 1; NaN where nothing annotated would count.

    ``ap``: mean over IoU thresholds 0.50 to 0.95 and classes; ``ap50``, ``ap75``: at one
    threshold; ``small``, ``medium``, ``large``: of objects below 32², below 96² and from 96²
    pixels on; ``recall``: with at most 100 objects an image; ``classes``: ``ap`` of each.
    """

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float
    recall: float
    classes: tuple[float, ...]

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, the classes left out; scores that are not defined are null."""
        return {
            name: None if math.isnan(value) else value
            for name, value in vars(self).items()
            if name != "classes"
        }


def average_precision(
    data: CocoSet, found: Sequence[dict[str, Any]], categories: Sequence[int], kind: Kind
) -> AveragePrecision:
    """Score objects found against those annotated.

    Of an annotation of which a box or a mask was left out, its place is a crowd in that score:
    what is found there is neither right nor wrong.

    :param found: ``image_id``, ``category_id``, ``score``, and ``bbox`` [x, y, width, height]
        or ``segmentation`` (compressed run lengths) of each. Of a mask the area is the mask's.
    :param categories: the ids that count, in the order of ``classes``.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        field = "bbox" if kind == "bbox" else "segmentation"
        ignored = data.checked.ignored[field]
        truth = COCO()
        # Copies, since pycocotools leaves marks on them.
        objects = [
            {**entry, "iscrowd": int(entry["id"] in ignored) or entry["iscrowd"]}
            for entry in data.truth["annotations"]
        ]
        truth.dataset = {**data.truth, "annotations": objects}
        truth.createIndex()
        rows = [
            {key: entry[key] for key in ("image_id", "category_id", "score", field)}
            for entry in found
        ]
        answers = truth.loadRes(rows) if rows else _nothing(COCO, data)
        evaluator = COCOeval(truth, answers, kind)
        evaluator.params.catIds = list(categories)
        evaluator.params.imgIds = [entry["id"] for entry in data.truth["images"]]
        evaluator.evaluate()
        evaluator.accumulate()
    # (thresholds, recalls, classes, areas: all, small, medium, large), at most 100 objects an
    # image; -1 is not defined.
    precision = evaluator.eval["precision"][..., -1]
    recall = evaluator.eval["recall"][:, :, 0, -1]
    thresholds = evaluator.params.iouThrs
    order = [evaluator.params.catIds.index(category) for category in categories]
    return AveragePrecision(
        ap=_mean(precision[..., 0]),
        ap50=_mean(precision[np.isclose(thresholds, 0.5), ..., 0]),
        ap75=_mean(precision[np.isclose(thresholds, 0.75), ..., 0]),
        small=_mean(precision[..., 1]),
        medium=_mean(precision[..., 2]),
        large=_mean(precision[..., 3]),
        recall=_mean(recall),
        classes=tuple(_mean(precision[:, :, place, 0]) for place in order),
    )


def _nothing(coco: Any, data: CocoSet) -> Any:
    """What loadRes gives for no objects at all, which it cannot take."""
    answers = coco()
    answers.dataset = {**data.truth, "annotations": []}
    answers.createIndex()
    return answers


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan
