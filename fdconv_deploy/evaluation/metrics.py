"""Mean IoU (mIoU) and accuracies of segmentors, from a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
