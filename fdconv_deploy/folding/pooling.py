"""Adaptive average pooling at a fixed size: means of equal windows, else constant products.

Exporters turn windows of unequal size into gathers; a matrix says the same thing. Where the
windows divide an axis evenly, a mean is more exact: a product adds up in one running sum.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def pooling_matrix(length: int, bins: int) -> NDArray[np.float64]:
    """Row i averages the inputs from floor(i·length/bins) to ceil((i+1)·length/bins).

    Returns:
        ``(bins, length)`` float64, each row's sum 1.
    """
    matrix = np.zeros((bins, length))
    for i in range(bins):
        start, stop = i * length // bins, -(-(i + 1) * length // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


class FoldedAdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` for inputs of whatever size it is traced at."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size = pool.output_size
        self.output_size = (size, size) if isinstance(size, int) or size is None else size

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` float -> ``(B, C, h, w)``."""
        height, width = x.shape[-2:]
        rows, columns = self.output_size
        rows, columns = rows or height, columns or width
        if width % columns == 0:
            x = x.unflatten(-1, (columns, width // columns)).mean(-1)
        else:
            x = x @ torch.from_numpy(pooling_matrix(width, columns).T).to(x)
        if height % rows == 0:
            return x.unflatten(-2, (rows, height // rows)).mean(-2)
        return torch.from_numpy(pooling_matrix(height, rows)).to(x) @ x
