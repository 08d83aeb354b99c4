"""Which boxes answer for which things: mmdetection's rules for training."""

from __future__ import annotations

import torch
from torch import Tensor

from fdconv_deploy.config import BoxCoderConfig

BACKGROUND, IGNORED = -1, -2


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of ``(N, 4)`` and ``(M, 4)`` boxes x1 y1 x2 y2, ``(N, M)``."""
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-6)


def assign(overlap: Tensor, positive: float, negative: float, lowest: float) -> Tensor:
    """MaxIoUAssigner: which thing each box is for.

    Args:
        overlap: IoU of boxes and things, ``(N, G)``.
        positive: from this IoU on a box is for the thing it covers best.
        negative: below it, it is for none; between the two it is left out of the loss.
        lowest: a thing's best boxes are for it from this IoU on, whatever else they cover.

    Returns:
        ``(N,)`` int64: the thing's index, ``BACKGROUND`` or ``IGNORED``.
    """
    boxes, things = overlap.shape
    if not things:
        return torch.full((boxes,), BACKGROUND)
    best, which = overlap.max(1)
    result = torch.where(best < negative, BACKGROUND, IGNORED)
    result = torch.where(best >= positive, which, result)
    most = overlap.max(0).values
    for thing in range(things):
        if most[thing] >= lowest:
            result[overlap[:, thing] == most[thing]] = thing
    return result


def sample(
    assigned: Tensor, number: int, positive_share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """RandomSampler: indices of at most ``number`` boxes, those for things and for none.

    No more than ``positive_share`` of them are for things; the rest is filled up with others.
    """

    def some(found: Tensor, count: int) -> Tensor:
        return found[torch.randperm(len(found), generator=generator)[:count]]

    positive = some((assigned >= 0).nonzero()[:, 0], int(number * positive_share))
    return positive, some((assigned == BACKGROUND).nonzero()[:, 0], number - len(positive))


def encode(boxes: Tensor, targets: Tensor, coder: BoxCoderConfig) -> Tensor:
    """The deltas that move ``boxes`` onto ``targets``: what `decode` undoes; for training.

    Both ``(..., 4)`` float32 with width and height above 0; ``(..., 4)`` float32.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    wanted = targets[..., 2:] - targets[..., :2]
    shift = ((targets[..., :2] + targets[..., 2:]) - (boxes[..., :2] + boxes[..., 2:])) * 0.5
    deltas = torch.cat([shift / size, (wanted / size).log()], dim=-1)
    return (deltas - deltas.new_tensor(coder.means)) / deltas.new_tensor(coder.stds)
