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
    """What one network scores, counted over images: samples ``S``, and what it finds, ``F``.

    Attributes:
        measure: of a class, such as "IoU".
        unit: what two networks agree in.
    """

    measure: ClassVar[str]
    unit: ClassVar[str] = "class"

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

    Matrices of several images add up.

    Args:
        truth: integers. Pixels whose truth is not a class (mmsegmentation's 255) do not count.
        prediction: classes, in the same shape.
        num_classes: how many there are.

    Raises:
        ValueError: shapes differ, or a prediction is not a class.
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
    """Scores from 0 to 1.

    Attributes:
        iou: per class; NaN where a class is in neither truth nor prediction.
        pixel_accuracy: the share of all pixels that are right.
        accuracy: per class, the share of its true pixels that are right; NaN where it is not in
            the truth.
    """

    iou: tuple[float, ...]
    mean_iou: float
    pixel_accuracy: float
    accuracy: tuple[float, ...]
    mean_accuracy: float


def scores(confusion: NDArray[np.int64]) -> Scores:
    """Score a confusion matrix (rows: truth).

    IoU = intersection / union. Its mean goes over the classes that occur in the truth or the
    prediction, accuracy's over those in the truth.

    Raises:
        ValueError: the matrix is empty.
    """
    total = int(confusion.sum())
    if total == 0:
        raise ValueError("the confusion matrix counts no pixels")
    hits = np.diag(confusion).astype(np.float64)
    true = confusion.sum(1)
    union = confusion.sum(0) + true - hits
    iou = _share(hits, union)
    accuracy = _share(hits, true)
    return Scores(
        tuple(iou.tolist()),
        float(np.nanmean(iou)),
        float(hits.sum() / total),
        tuple(accuracy.tolist()),
        float(np.nanmean(accuracy)),
    )


def _share(part: NDArray[np.float64], whole: NDArray[Any]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
