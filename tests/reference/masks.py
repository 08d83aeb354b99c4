"""Pasting an instance's mask, pixel by pixel in float64, from what mmdetection documents.

The mask's cells divide the box evenly. Between cell centres values are linear in each
direction; beyond the outermost centres they fall to 0 within one cell.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def pasted_probabilities(
    mask: NDArray[np.floating], box: tuple[float, float, float, float], size: tuple[int, int]
) -> NDArray[np.float64]:
    """``(h, w)`` probabilities and a box x1, y1, x2, y2 -> ``(H, W)``, each pixel's own."""
    height, width = size
    out = np.zeros(size)
    for y in range(height):
        for x in range(width):
            row = (y + 0.5 - box[1]) * mask.shape[0] / (box[3] - box[1])
            column = (x + 0.5 - box[0]) * mask.shape[1] / (box[2] - box[0])
            out[y, x] = _at(mask, row, column)
    return out


def _at(mask: NDArray[np.floating], row: float, column: float) -> float:
    """The value at a place in units of cells, whose centres are at halves."""
    total = 0.0
    for i in (math.floor(row - 0.5), math.floor(row - 0.5) + 1):
        for j in (math.floor(column - 0.5), math.floor(column - 0.5) + 1):
            if 0 <= i < mask.shape[0] and 0 <= j < mask.shape[1]:
                nearness = (1 - abs(row - i - 0.5)) * (1 - abs(column - j - 0.5))
                total += nearness * float(mask[i, j])
    return total
