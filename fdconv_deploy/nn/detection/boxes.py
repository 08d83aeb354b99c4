"""Boxes and the deltas that move them: mmdetection's DeltaXYWHBBoxCoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdconv_deploy.config import BoxCoderConfig

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
