"""A detector's box arithmetic, derived again in float64 numpy, one box at a time.

Nothing here is shared with the package: no separable weights, no shifted groups, no sorting
tricks. Slow and plain, so that it can be believed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import RCNNTestConfig, RPNTestConfig

Array = NDArray[np.float64]


def bilinear(feature: Array, y: float, x: float) -> Array:
    """``(C, H, W)`` at a point: 0 beyond one position outside, the border's value before that."""
    height, width = feature.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(feature.shape[0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    return (
        feature[:, top, left] * (1 - v) * (1 - u)
        + feature[:, top, right] * (1 - v) * u
        + feature[:, bottom, left] * v * (1 - u)
        + feature[:, bottom, right] * v * u
    )


def roi_align(feature: Array, box: Array, size: int, scale: float, ratio: int = 0) -> Array:
    """One region, ``aligned=True``, mean of samples: ``(C, H, W)``, ``(4,)`` -> ``(C, s, s)``."""
    x1, y1, x2, y2 = (float(v) * scale - 0.5 for v in box)
    tall, wide = (y2 - y1) / size, (x2 - x1) / size
    down, across = (ratio or math.ceil(tall)), (ratio or math.ceil(wide))
    result = np.zeros((feature.shape[0], size, size))
    for row in range(size):
        for column in range(size):
            for i in range(down):
                for j in range(across):
                    y = y1 + (row + (i + 0.5) / down) * tall
                    x = x1 + (column + (j + 0.5) / across) * wide
                    result[:, row, column] += bilinear(feature, y, x) / (down * across)
    return result


def decode(box: Array, delta: Array, means: Array, stds: Array) -> Array:
    """One box moved by one delta, growth limited to 1000/16."""
    dx, dy, dw, dh = delta * stds + means
    limit = math.log(1000 / 16)
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = (box[0] + box[2]) / 2 + dx * width, (box[1] + box[3]) / 2 + dy * height
    width *= math.exp(min(max(dw, -limit), limit))
    height *= math.exp(min(max(dh, -limit), limit))
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def iou(a: Array, b: Array) -> float:
    """Intersection over union of two boxes; 0 if both are empty."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    common = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


def suppress(boxes: Array, scores: Array, groups: NDArray, threshold: float) -> list[int]:
    """Indices that stay, best first, equal scores by index; boxes of other groups don't count."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        rivals = [k for k in kept if groups[k] == groups[i]]
        if all(iou(boxes[k], boxes[i]) <= threshold for k in rivals):
            kept.append(i)
    return kept


def level(box: Array, finest: float = 56, levels: int = 4) -> int:
    """The pyramid level of a box."""
    size = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return min(max(math.floor(math.log2(size / finest + 1e-6)), 0), levels - 1)


def clip(box: Array, height: float, width: float) -> Array:
    """A box cut at the borders of its image."""
    return np.clip(box, 0, [width, height, width, height])


def anchors(
    strides: Sequence[int], sizes: Sequence[tuple[int, int]], scale: float = 8
) -> list[Array]:
    """The published anchors of each level, ``(h·w·3, 4)``, ratios 1/2, 1, 2."""
    levels = []
    for stride, (height, width) in zip(strides, sizes, strict=True):
        boxes = []
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
                    cx, cy = x * stride, y * stride
                    boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        levels.append(np.array(boxes))
    return levels


def propose(
    levels: Sequence[Array],
    logits: Sequence[Array],
    deltas: Sequence[Array],
    size: tuple[float, float],
    test: RPNTestConfig,
) -> Array:
    """Regions of one image, best first: ``(N, 4)``."""
    zero, one = np.zeros(4), np.ones(4)
    boxes, scores, groups = [], [], []
    for group, (own, raw, moves) in enumerate(zip(levels, logits, deltas, strict=True)):
        order = sorted(range(len(raw)), key=lambda i: (-raw[i], i))[: test.nms_pre]
        for i in order:
            box = clip(decode(own[i], moves[i], zero, one), *size)
            if min(box[2] - box[0], box[3] - box[1]) > test.min_bbox_size:
                boxes.append(box)
                scores.append(1 / (1 + math.exp(-raw[i])))
                groups.append(group)
    kept = suppress(np.array(boxes), np.array(scores), np.array(groups), test.nms_iou_threshold)
    return np.array([boxes[i] for i in kept[: test.max_per_img]])


def choose(
    regions: Array,
    logits: Array,
    deltas: Array,
    size: tuple[float, float],
    test: RCNNTestConfig,
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Boxes, scores and labels of one image, best first.

    ``regions`` ``(N, 4)``, ``logits`` ``(N, classes + 1)``, ``deltas`` ``(N, classes, 4)``.
    """
    zero, stds = np.zeros(4), np.array([0.1, 0.1, 0.2, 0.2])
    boxes, scores, labels = [], [], []
    for region, raw, moves in zip(regions, logits, deltas, strict=True):
        powers = np.exp(raw - raw.max())
        for label, probability in enumerate(powers[:-1] / powers.sum()):
            if probability > test.score_thr:
                boxes.append(clip(decode(region, moves[label], zero, stds), *size))
                scores.append(probability)
                labels.append(label)
    kept = suppress(np.array(boxes), np.array(scores), np.array(labels), test.nms_iou_threshold)
    kept = kept[: test.max_per_img]
    return (
        np.array([boxes[i] for i in kept]),
        np.array([scores[i] for i in kept]),
        np.array([labels[i] for i in kept]),
    )
