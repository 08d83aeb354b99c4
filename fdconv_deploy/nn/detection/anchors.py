"""The boxes a region proposal head starts from: mmdetection's AnchorGenerator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import RPNHeadConfig


def base_anchors(stride: int, scales: Sequence[float], ratios: Sequence[float]) -> NDArray:
    """The anchors at the origin of a level: ratios outermost, scales within.

    Returns:
        ``(len(ratios)·len(scales), 4)`` float32, x1 y1 x2 y2, centred on 0, not rounded.
    """
    roots = np.sqrt(np.asarray(ratios, np.float32))
    sizes = np.asarray(scales, np.float32)
    # One float32 product after the other, in the published order.
    widths = (np.float32(stride) * (1 / roots)[:, None] * sizes).reshape(-1)
    heights = (np.float32(stride) * roots[:, None] * sizes).reshape(-1)
    half = np.float32(0.5)
    return np.stack([-half * widths, -half * heights, half * widths, half * heights], axis=1)


def grid_anchors(config: RPNHeadConfig, level: int, height: int, width: int) -> NDArray:
    """All anchors of a pyramid level: row by row, at each position all its anchors.

    Args:
        level: index into ``config.strides``.
        height: of the level's feature map, as ``width``.

    Returns:
        ``(height·width·A, 4)`` float32, x1 y1 x2 y2 in pixels of the network's input.
    """
    stride = config.strides[level]
    x = np.arange(width, dtype=np.float32) * stride
    y = np.arange(height, dtype=np.float32) * stride
    columns, rows = np.meshgrid(x, y)
    shifts = np.stack([columns, rows, columns, rows], axis=-1).reshape(-1, 1, 4)
    return (shifts + base_anchors(stride, config.scales, config.ratios)).reshape(-1, 4)
