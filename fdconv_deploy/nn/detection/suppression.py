"""Non-maximum suppression: mmcv's ``nms`` and the trick its ``batched_nms`` plays."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.nn.detection.selection import EXCLUDED


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
        groups: ``(N,)`` int64: level or class of each.
        scores: ``(B, N)`` float32; those `EXCLUDED` do not count for the shift.
    """
    taking_part = torch.where((scores > EXCLUDED)[..., None], boxes, 0)
    step = taking_part.amax(dim=(1, 2), keepdim=True) + 1
    return boxes + groups.to(boxes)[:, None] * step
