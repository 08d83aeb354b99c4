"""What networks are scored by: what all scores have in common, and mean IoU (mIoU)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fdconv_deploy.runtime import Detection, Segmentation

S = TypeVar("S")
F = TypeVar("F", bound=Segmentation | Detection)


class Score(ABC, Generic[S, F]):
    """What one network scores, counted over images: samples ``S``, and what it finds, ``F``."""

    measure: ClassVar[str]  # of a class, such as "IoU"
    unit: ClassVar[str] = "class"  # what two networks agree in

    @abstractmethod
    def add(self, sample: S, found: F) -> None:
        """Count one image."""

    def same(self, found: F, first: F) -> tuple[int, int]:
        """In how much of how much two answers to an image agree: pixels of one class, of all."""
        ours, theirs = found.labels, first.labels
        return int((ours == theirs).sum()), ours.size

    def truth(self) -> dict[str, Any]:
        """For JSON: what the images' truth holds."""
        return {}

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """For JSON: scores of all classes together; null where they are not defined."""

    @abstractmethod
    def by_class(self) -> list[dict[str, Any]]:
        """For JSON: scores of each class; null where they are not defined."""


def defined(value: float) -> float | None:
    """For JSON: None in place of NaN."""
    return None if np.isnan(value) else value


def confusion_matrix(
    truth: ArrayLike, prediction: ArrayLike, num_classes: int
) -> NDArray[np.int64]:
    """Count pixels by (true class, predicted class): ``(num_classes, num_classes)`` int64.

    Matrices of several images add up. Pixels whose truth is no class (mmsegmentation's 255) do not
    count; ``ValueError`` where shapes differ, or a prediction is no class.
    """
    true, predicted = np.asarray(truth), np.asarray(prediction)
    if true.shape != predicted.shape:
        raise ValueError(f"labels of shape {true.shape} against a prediction of {predicted.shape}")
    judged = (true >= 0) & (true < num_classes)
    rows, columns = true[judged].astype(np.int64), predicted[judged].astype(np.int64)
    if columns.size and not (columns.min() >= 0 and columns.max() < num_classes):
        raise ValueError(f"a prediction holds a class outside 0..{num_classes - 1}")
    counts = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


@dataclass(frozen=True)
class Scores:
    """Scores from 0 to 1."""

    iou: tuple[float, ...]  # per class; NaN where it is in neither truth nor prediction
    mean_iou: float
    pixel_accuracy: float  # the share of all pixels that are right
    accuracy: tuple[float, ...]  # per class, of its true pixels; NaN where there are none
    mean_accuracy: float


def scores(confusion: NDArray[np.int64]) -> Scores:
    """Score a confusion matrix (rows: truth); ``ValueError`` if it is empty.

    IoU = intersection / union. Its mean goes over the classes that occur in the truth or the
    prediction, accuracy's over those in the truth.
    """
    total = int(confusion.sum())
    if total == 0:
        raise ValueError("the confusion matrix counts no pixels")
    hits = np.diag(confusion).astype(np.float64)
    true = confusion.sum(1)
    union = confusion.sum(0) + true - hits
    with np.errstate(invalid="ignore"):  # of 0 in 0
        iou, accuracy = hits / union, hits / true
    return Scores(
        tuple(iou.tolist()),
        float(np.nanmean(iou)),
        float(hits.sum() / total),
        tuple(accuracy.tolist()),
        float(np.nanmean(accuracy)),
    )
