"""Boxes, anchors, non-maximum suppression, and regions cut out of maps, as mmdetection has them.

Boxes are x1 y1 x2 y2, float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.config import BoxCoderConfig, RoIConfig, RPNHeadConfig


class NonMaxSuppression(nn.Module):
    """Which boxes stay when each, best score first, removes those that overlap it too much.

    Greedy, in float32, as mmcv and ONNX define it: a box is removed if its IoU with a kept one is
    above the threshold. Of equal scores the lower index goes first. Boxes whose score is `EXCLUDED`
    take no part. At most ``limit`` of each image are kept.
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
    group; a border case depends on it, so it is done here, too. Of boxes ``(B, N, 4)`` with
    ``scores`` ``(B, N)``; those `EXCLUDED` do not count for the shift.

    Args:
        groups: ``(M,)`` int64: level or class of each; N = k·M boxes have these k times over.
    """
    taking_part = torch.where((scores > EXCLUDED)[..., None], boxes, 0)
    step = taking_part.amax(dim=(1, 2))[:, None, None, None] + 1
    apart = boxes.unflatten(1, (-1, len(groups))) + groups.to(boxes)[:, None] * step
    return apart.flatten(1, 2)


# A box grows or shrinks at most this many times (mmdetection's wh_ratio_clip, 16/1000).
LARGEST_LOG_SCALE = abs(math.log(16 / 1000))


def decode(boxes: Tensor, deltas: Tensor, coder: BoxCoderConfig) -> Tensor:
    """Move boxes by deltas, ``(..., 4)`` float32 all, not clipped.

    ``deltas``, broadcast against ``boxes``: shift of the centre in widths and heights, logarithms
    of the growth.
    """
    means, stds = deltas.new_tensor(coder.means), deltas.new_tensor(coder.stds)
    deltas = deltas * stds + means
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    size = boxes[..., 2:] - boxes[..., :2]
    centre = centre + size * deltas[..., :2]
    size = size * deltas[..., 2:].clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE).exp()
    return torch.cat([centre - size * 0.5, centre + size * 0.5], dim=-1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cut boxes ``(B, N, 4)`` at the borders of images of height and width ``sizes`` ``(B, 2)``."""
    limits = sizes[:, None, [1, 0, 1, 0]]
    return torch.minimum(boxes.clamp(min=0), limits)


def anchors_at(places: Tensor, config: RPNHeadConfig, level: int, width: int) -> Tensor:
    """Some anchors of a pyramid level, ``(..., 4)`` float32, in pixels of the network's input.

    Not rounded. Computed from their places: a graph with all anchors of 800×1344 would keep 4 MB.

    Args:
        places: int64, of any shape; row by row, at each position all its anchors.
        level: index into ``config.strides``.
        width: of the level's feature map.
    """
    stride = config.strides[level]
    roots, sizes = (np.asarray(part, np.float32) for part in (config.ratios, config.scales))
    roots = np.sqrt(roots)
    # One float32 product after the other, in the published order; ratios outermost.
    widths = (np.float32(stride) * (1 / roots)[:, None] * sizes).reshape(-1)
    heights = (np.float32(stride) * roots[:, None] * sizes).reshape(-1)
    corners = np.stack([-widths, -heights, widths, heights], axis=1) * np.float32(0.5)
    base = torch.from_numpy(corners).to(places.device)
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


class RoIAlign(nn.Module):
    """Cut regions out of a feature map, as mmcv does.

    The mean over a grid of bilinear samples is separable: each bin is a weighted sum over rows of a
    weighted sum over columns. So a region is two small matrix products over its pixels.

    Args:
        output_size: bins in each direction.
        spatial_scale: positions of the map per pixel of the input, 1 / stride.
        sampling_ratio: samples of a bin in each direction; 0: as many as its size rounded up,
            so that of an empty region nothing is sampled and its bins are 0.
    """

    def __init__(self, output_size: int, spatial_scale: float, sampling_ratio: int = 0) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> ``(B·P, C, output_size, output_size)`` float32, image by image.

        ``boxes``: ``(B, P, 4)`` in pixels of the input, x1 ≤ x2, y1 ≤ y2. Differentiable in
        ``features``.
        """
        height, width = features.shape[-2:]
        count = boxes.shape[1]
        edges = boxes.detach().reshape(-1, 4) * self.spatial_scale - 0.5
        horizontal = self._weights(edges[:, 0], edges[:, 2], width)
        vertical = self._weights(edges[:, 1], edges[:, 3], height)
        empty = features.new_zeros(features.shape[1], self.output_size, self.output_size)
        regions = []
        columns, lines = _extents(horizontal), _extents(vertical)
        for index, ((left, right), (top, bottom)) in enumerate(zip(columns, lines, strict=True)):
            if left >= right or top >= bottom:
                regions.append(empty)
                continue
            pixels = features[index // count, :, top:bottom, left:right]
            sums = pixels @ horizontal[index, :, left:right].T
            regions.append(vertical[index, :, top:bottom] @ sums)
        return torch.stack(regions) if regions else empty.new_zeros(0, *empty.shape)

    def _weights(self, start: Tensor, end: Tensor, length: int) -> Tensor:
        """How much each position of an axis counts in each bin: ``(R, output_size, length)``."""
        bins = self.output_size
        size = (end - start) / bins
        ratio = self.sampling_ratio
        grid = size.ceil() if ratio == 0 else torch.full_like(size, ratio)
        most = int(grid.max()) if grid.numel() else 0
        sample = torch.arange(most).to(start)
        begin = start[:, None] + torch.arange(bins).to(start) * size[:, None]
        steps = (sample + 0.5) * size[:, None] / grid.clamp(min=1)[:, None]
        at = begin[:, :, None] + steps[:, None]  # (R, bins, samples)
        # A sample more than one position outside the map is 0, a nearer one is the border's.
        counts = (at >= -1) & (at <= length) & (sample < grid[:, None])[:, None]
        at = at.clamp(0, length - 1)
        low = at.floor()
        share = counts / grid.clamp(min=1)[:, None, None]
        upper = (at - low) * share
        low_index = low.long()
        weights = start.new_zeros(len(start), bins, length)
        weights.scatter_add_(2, low_index, share - upper)
        weights.scatter_add_(2, (low_index + 1).clamp(max=length - 1), upper)
        return weights


def _extents(weights: Tensor) -> list[tuple[int, int]]:
    """First and past-the-last position that counts in any bin of each region."""
    used = (weights != 0).any(dim=1)
    length = used.shape[1]
    first = torch.where(used.any(1), used.int().argmax(1), length)
    last = length - used.flip(1).int().argmax(1)
    return list(zip(first.tolist(), last.tolist(), strict=True))


# Where boxes of other levels are put: an empty box beyond every map's border, of which
# RoIAlign samples nothing.
_ELSEWHERE = -1000.0


def levels_of(boxes: Tensor, config: RoIConfig) -> Tensor:
    """The level of each box, ``(...)`` int64, of ``boxes`` ``(..., 4)`` float32.

    ``floor(log2(√area / finest_scale + 1e-6))``, at least 0 and at most the last level. It is
    told by comparing with powers of two: runtimes' logarithms differ in their last digit.
    """
    size = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1).sqrt()
    doublings = size / config.finest_scale + 1e-6
    levels = torch.zeros_like(doublings, dtype=torch.int64)
    for level in range(1, len(config.featmap_strides)):
        levels = levels + (doublings >= 2**level)
    return levels


class RoIExtractor(nn.Module):
    """Features of regions, each from its own level.

    Every level is asked for every region, those of other levels made empty, and the answers
    are added: all shapes stay static, and an empty region costs nothing but its zeros.
    """

    def __init__(self, config: RoIConfig) -> None:
        super().__init__()
        self.config = config
        self.roi_layers = nn.ModuleList(
            RoIAlign(config.output_size, 1 / stride, config.sampling_ratio)
            for stride in config.featmap_strides
        )

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Cut ``boxes`` ``(B, P, 4)`` out: as `RoIAlign`, of levels ``(B, C, h, w)`` float32.

        Levels past ``featmap_strides`` are not used.
        """
        levels = levels_of(boxes, self.config)
        parts = []
        for level, layer in enumerate(self.roi_layers):
            own = torch.where((levels == level)[..., None], boxes, _ELSEWHERE)
            parts.append(layer(features[level], own))
        return sum(parts[1:], parts[0])
