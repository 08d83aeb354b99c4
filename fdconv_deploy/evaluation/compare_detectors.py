"""Box and mask AP and speed of detectors, side by side in one run. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.evaluation.average_precision import AveragePrecision, average_precision
from fdconv_deploy.evaluation.coco import CocoSet
from fdconv_deploy.evaluation.coco_annotations import Annotations
from fdconv_deploy.evaluation.interleaving import Answer, Side, Timed, Turns, bundle_details
from fdconv_deploy.runtime import Detection, Session
from fdconv_deploy.runtime.detection import SHOWN_SCORE

# Two objects of one class are the same from this intersection over union on.
_SAME = 0.9


@dataclass(frozen=True)
class DetectionResult(Timed[Detection]):
    """One side's scores and speed. ``masks`` is None where it or the data has none."""

    boxes: AveragePrecision
    masks: AveragePrecision | None
    objects: int
    agreement: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON; scores that are not defined are null."""
        scored = {"box": self.boxes, "mask": self.masks}
        summary = {
            **{kind: score and score.as_dict() for kind, score in scored.items()},
            "objects": self.objects,
            "agreement": self.agreement,
        }
        classes = [
            {
                f"{kind}_ap": None if np.isnan(score.classes[index]) else score.classes[index]
                for kind, score in scored.items()
                if score is not None
            }
            for index in range(len(self.side.classes))
        ]
        return self.report(summary, classes)


@dataclass(frozen=True)
class DetectionEvaluation:
    """All sides on the same images.

    Attributes:
        objects: annotated in them.
        crowds: of these, those that COCO's code takes for a crowd and does not score.
        checked: what of the annotations does not count, or counts and is odd.
    """

    results: tuple[DetectionResult, ...]
    images: int
    objects: int
    crowds: int
    checked: Annotations

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "images": self.images,
            "objects": self.objects,
            "crowds": self.crowds,
            "left_out": [vars(finding) for finding in self.checked.left_out],
            "noted": [vars(finding) for finding in self.checked.noted],
            "sides": [result.as_dict() for result in self.results],
        }


def bundle_side(session: Session) -> Side[Detection]:
    """A bundle's side.

    :param session: on a detector's bundle; the caller closes it.
    """

    def answer(image: NDArray[np.uint8]) -> Answer[Detection]:
        found = session.detect(image)
        return Answer(found, found.timings["inference"])

    return Side(str(session.bundle.path), answer, session.classes, bundle_details(session))


def evaluate_detectors(
    sides: Sequence[Side[Detection]],
    data: CocoSet,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> DetectionEvaluation:
    """Score sides on annotated images, all the objects they give.

    They take turns; see `Turns`. Decoding files is not timed. A result's agreement is the
    share of the objects scored 0.3 or more, its own and the first side's, that have a partner
    of the same class on the other side with an IoU of 0.9 or more; 1 when there are none.

    :param sides: one or more, all of the same classes.
    :param progress: called with the number of images done after each.
    :raises DatasetError: the sides' classes differ, or are not in the data.
    """
    turns = Turns(sides)
    categories = data.category_ids(sides[0].classes)
    found: list[list[dict[str, Any]]] = [[] for _ in sides]
    paired, shown = np.zeros(len(sides)), np.zeros(len(sides))
    masks = [data.has_masks for _ in sides]
    for sample, answers in turns.over(data, progress):
        for index, answer in enumerate(answers):
            masks[index] &= answer.has_masks
            found[index] += coco_results(answer, sample.number, categories, masks[index])
            both = [answer.kept(SHOWN_SCORE), answers[0].kept(SHOWN_SCORE)]
            paired[index] += 2 * _pairs(*both)
            shown[index] += len(both[0]) + len(both[1])
    results = tuple(
        DetectionResult(
            *turns.timed(index),
            average_precision(data, found[index], categories, "bbox"),
            average_precision(data, found[index], categories, "segm") if masks[index] else None,
            len(found[index]),
            float(paired[index] / shown[index]) if shown[index] else 1.0,
        )
        for index in range(len(sides))
    )
    objects = data.truth["annotations"]
    crowds = sum(entry["iscrowd"] for entry in objects)
    return DetectionEvaluation(results, len(data), len(objects), crowds, data.checked)


def coco_results(
    found: Detection, image: int, categories: Sequence[int], masks: bool
) -> list[dict[str, Any]]:
    """Objects as COCO's result files have them.

    :param image: the image's id.
    :param categories: each class's category id.
    :param masks: whether to add ``segmentation``.
    """
    sizes = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], axis=1)
    rows: list[dict[str, Any]] = [
        {"image_id": image, "category_id": categories[label], "bbox": box, "score": score}
        for label, box, score in zip(
            found.labels.tolist(), sizes.tolist(), found.scores.tolist(), strict=True
        )
    ]
    if masks:
        for row, rle in zip(rows, found.rle(), strict=True):
            row["segmentation"] = rle
    return rows


def _pairs(ours: Detection, theirs: Detection) -> int:
    """How many objects of one have a partner in the other, each in one pair at most."""
    if not len(ours) or not len(theirs):
        return 0
    overlap = _iou(ours.boxes, theirs.boxes)
    overlap[ours.labels[:, None] != theirs.labels] = 0
    pairs = 0
    while overlap.max() >= _SAME:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        pairs += 1
    return pairs


def _iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = a.astype(np.float64)[:, None], b.astype(np.float64)[None]  # type: ignore[assignment]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.clip(sides, 0, None).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    union = areas[0] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
