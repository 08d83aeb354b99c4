"""Accuracy and speed of networks on labelled images, side by side in one run.

Nothing here imports torch. Bundles' sides come from `bundle_side`, PyTorch networks' from
`torch_side`, both opened by `sides.open_sides`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.evaluation.datasets import DatasetError, Sample
from fdconv_deploy.evaluation.interleaving import Answer, Side, Timed, Turns, bundle_details
from fdconv_deploy.evaluation.metrics import Scores, confusion_matrix, scores
from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.segmentation import Mode

Labels = NDArray[np.integer]
"""(H, W), at the image's size: what a segmentation network finds."""


@dataclass(frozen=True)
class Result(Timed[Labels]):
    """One side's scores and speed.

    Attributes:
        confusion: pixels by (true class, predicted class), int64.
    """

    confusion: NDArray[np.int64]
    scores: Scores

    def as_dict(self) -> dict[str, Any]:
        """For JSON; scores that are not defined are null."""
        summary = {
            "mean_iou": self.scores.mean_iou,
            "pixel_accuracy": self.scores.pixel_accuracy,
            "mean_accuracy": self.scores.mean_accuracy,
        }
        rows = zip(self.scores.iou, self.scores.accuracy, self.confusion.sum(1), strict=True)
        classes = [
            {"iou": _defined(iou), "accuracy": _defined(accuracy), "pixels": int(pixels)}
            for iou, accuracy, pixels in rows
        ]
        return self.report(summary, classes)


@dataclass(frozen=True)
class Evaluation:
    """All sides on the same images.

    Attributes:
        images: how many.
        pixels: counted ones.
        agreement: of each side, the share of all pixels that it labels as the first one does.
    """

    results: tuple[Result, ...]
    images: int
    pixels: int
    agreement: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sides = [
            {**result.as_dict(), "agreement": share}
            for result, share in zip(self.results, self.agreement, strict=True)
        ]
        return {"images": self.images, "pixels": self.pixels, "sides": sides}


def bundle_side(
    session: Session, *, mode: Mode | None = None, fit: Fit | None = None
) -> Side[Labels]:
    """A bundle's side.

    :param session: on the bundle; the caller closes it.
    :param mode: "whole" or "slide"; the one the network was tested in when not given.
    :param fit: see `Session.segment`.
    """

    def answer(image: NDArray[Any]) -> Answer[Labels]:
        found = session.segment(image, mode=mode, fit=fit)
        return Answer(found.labels, found.timings["inference"])

    details = bundle_details(session, mode=mode or session.segmentation.mode)
    return Side(str(session.bundle.path), answer, session.classes, details, session.preprocessing)


def evaluate(
    sides: Sequence[Side[Labels]],
    samples: Iterable[Sample],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Score sides on labelled images.

    They take turns; see `Turns`. Decoding files is not timed.

    :param sides: one or more, all of the same classes.
    :param progress: called with the number of images done after each.
    :raises DatasetError: the sides' classes differ, or no pixel counts.
    """
    turns = Turns(sides)
    count = len(sides[0].classes)
    confusions = [np.zeros((count, count), np.int64) for _ in sides]
    same = np.zeros(len(sides), np.int64)
    images = pixels = 0
    for sample, answers in turns.over(samples, progress):
        for index, labels in enumerate(answers):
            confusions[index] += confusion_matrix(sample.truth, labels, count)
            same[index] += int((labels == answers[0]).sum())
        images, pixels = images + 1, pixels + sample.truth.size
    counted = int(confusions[0].sum())
    if not counted:
        raise DatasetError(
            f"Of {images} images no pixel counts: the masks hold nothing but labels to ignore."
        )
    results = tuple(
        Result(*turns.timed(index), confusion, scores(confusion))
        for index, confusion in enumerate(confusions)
    )
    return Evaluation(results, images, counted, tuple((same / pixels).tolist()))


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value
