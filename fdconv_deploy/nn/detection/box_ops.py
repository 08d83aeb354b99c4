"""Boxes, anchors, the best of many scores, and non-maximum suppression, as mmdetection has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.config import BoxCoderConfig, RPNHeadConfig


class NonMaxSuppression(nn.Module):
    """Which boxes stay when each, best score first, removes those that overlap it too much.

    Greedy, in float32, as mmcv and ONNX define it: a box is removed if its IoU with a kept
    one is above the threshold. Of equal scores the lower index goes first. Boxes whose score
    is `EXCLUDED` take no part.

    Args:
        iou_threshold: IoU above this removes.
        limit: keep at most this many of each image.
    """

    def __init__(self, iou_threshold: float, limit: int) -> None:
        super().__init__()
        self.iou_threshold, self.limit = iou_threshold, limit

    @torch.no_grad()
    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """``(B, N, 4)`` and ``(B, N)`` float32 -> ``(B, N)`` bool."""
        keep = torch.zeros_like(scores, dtype=torch.bool)
        orders = scores.sort(dim=1, descending=True, stable=True).indices
        for image, order in enumerate(orders):
            chosen = order[scores[image][order] > EXCLUDED]
            array = boxes[image][chosen].cpu().numpy()
            kept = _greedy(array, self.iou_threshold, self.limit)
            keep[image, chosen[torch.from_numpy(kept).to(chosen.device)]] = True
        return keep


def _greedy(boxes: NDArray, iou_threshold: float, limit: int) -> NDArray[np.int64]:
    """Positions of the boxes that stay; ``boxes`` come best first."""
    x1, y1, x2, y2 = (np.ascontiguousarray(side) for side in boxes.T)
    areas = (x2 - x1) * (y2 - y1)
    alive = np.ones(len(boxes), dtype=bool)
    kept: list[int] = []
    with np.errstate(invalid="ignore", divide="ignore"):  # two empty boxes: 0/0 removes nothing
        for i in range(len(boxes)):
            if not alive[i]:
                continue
            kept.append(i)
            if len(kept) == limit:
                break
            rest = slice(i + 1, None)
            width = np.minimum(x2[rest], x2[i]) - np.maximum(x1[rest], x1[i])
            height = np.minimum(y2[rest], y2[i]) - np.maximum(y1[rest], y1[i])
            common = np.maximum(width, 0) * np.maximum(height, 0)
            overlap = common / (areas[i] + areas[rest] - common)
            alive[rest] &= ~(overlap > iou_threshold)
    return np.asarray(kept, dtype=np.int64)


def set_apart(boxes: Tensor, groups: Tensor, scores: Tensor) -> Tensor:
    """Shift each group's boxes past all others', so that one suppression serves all groups.

    mmcv's ``batched_nms``, whose float32 sums round coordinates a little more in each further
    group; a border case depends on it, so it is done here, too.

    Args:
        boxes: ``(B, N, 4)`` float32.
        groups: ``(M,)`` int64: level or class of each; N = k·M boxes have these k times over.
        scores: ``(B, N)`` float32; those `EXCLUDED` do not count for the shift.
    """
    taking_part = torch.where((scores > EXCLUDED)[..., None], boxes, 0)
    step = taking_part.amax(dim=(1, 2))[:, None, None, None] + 1
    apart = boxes.unflatten(1, (-1, len(groups))) + groups.to(boxes)[:, None] * step
    return apart.flatten(1, 2)


# A box grows or shrinks at most this many times (mmdetection's wh_ratio_clip, 16/1000).
LARGEST_LOG_SCALE = abs(math.log(16 / 1000))


def decode(boxes: Tensor, deltas: Tensor, coder: BoxCoderConfig) -> Tensor:
    """Move boxes by deltas.

    Args:
        boxes: ``(..., 4)`` float32, x1 y1 x2 y2.
        deltas: ``(..., 4)`` float32: shift of the centre in widths and heights, logarithms
            of the growth; broadcast against ``boxes``.

    Returns:
        ``(..., 4)`` float32, x1 y1 x2 y2, not clipped.
    """
    means, stds = deltas.new_tensor(coder.means), deltas.new_tensor(coder.stds)
    deltas = deltas * stds + means
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    size = boxes[..., 2:] - boxes[..., :2]
    centre = centre + size * deltas[..., :2]
    size = size * deltas[..., 2:].clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE).exp()
    return torch.cat([centre - size * 0.5, centre + size * 0.5], dim=-1)


def encode(boxes: Tensor, targets: Tensor, coder: BoxCoderConfig) -> Tensor:
    """The deltas that move ``boxes`` onto ``targets``: what `decode` undoes; for training.

    Both ``(..., 4)`` float32 with width and height above 0; ``(..., 4)`` float32.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    wanted = targets[..., 2:] - targets[..., :2]
    shift = ((targets[..., :2] + targets[..., 2:]) - (boxes[..., :2] + boxes[..., 2:])) * 0.5
    deltas = torch.cat([shift / size, (wanted / size).log()], dim=-1)
    return (deltas - deltas.new_tensor(coder.means)) / deltas.new_tensor(coder.stds)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cut boxes at the borders of their images.

    Args:
        boxes: ``(B, N, 4)`` float32, x1 y1 x2 y2.
        sizes: ``(B, 2)`` float32, height and width of each image.
    """
    limits = sizes[:, None, [1, 0, 1, 0]]
    return torch.minimum(boxes.clamp(min=0), limits)


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


def anchors_at(places: Tensor, config: RPNHeadConfig, level: int, width: int) -> Tensor:
    """Some anchors of a pyramid level, whose order is row by row, at each position all its anchors.

    Computed from their places: a graph with all anchors of 800×1344 would keep 4 MB of them.

    Args:
        places: int64, of any shape.
        config: has the strides, scales and ratios.
        level: index into ``config.strides``.
        width: of the level's feature map.

    Returns:
        ``(..., 4)`` float32, x1 y1 x2 y2 in pixels of the network's input.
    """
    stride = config.strides[level]
    base = torch.from_numpy(base_anchors(stride, config.scales, config.ratios)).to(places.device)
    position = torch.div(places, len(base), rounding_mode="trunc")
    row = torch.div(position, width, rounding_mode="trunc")
    corner = torch.stack([position - row * width, row], dim=-1).to(base.dtype) * stride
    return torch.cat([corner, corner], dim=-1) + base[places % len(base)]


# The score of what is not to be chosen. Scores proper are probabilities.
EXCLUDED = -1.0


class BestScores(nn.Module):
    """``(B, N)`` float32 -> the ``count`` highest, descending, and where they were.

    Of equal scores the one with the lower index comes first, as ONNX's TopK has it;
    ``torch.topk`` leaves that open.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(B, K)`` float32 and indices ``(B, K)`` int64, K = min(count, N)."""
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        return values[:, : self.count], indices[:, : self.count]


def rows(values: Tensor, indices: Tensor) -> Tensor:
    """``values`` ``(B, N, C)`` at ``indices`` ``(B, K)`` int64: ``(B, K, C)``."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))
