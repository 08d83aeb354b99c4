"""Regions cut out of feature maps: mmcv's RoIAlign and mmdetection's SingleRoIExtractor.

The mean over a grid of bilinear samples is separable: each bin is a weighted sum over rows
of a weighted sum over columns. So a region is two small matrix products over its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdconv_deploy.config import RoIConfig


class RoIAlign(nn.Module):
    """Cut regions out of a feature map.

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
        """Differentiable in ``features``.

        Args:
            features: ``(B, C, H, W)`` float32.
            boxes: ``(B, P, 4)`` float32, x1 y1 x2 y2 in pixels of the input, x1 ≤ x2, y1 ≤ y2.

        Returns:
            ``(B·P, C, output_size, output_size)`` float32, image by image.
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
        if not regions:
            return empty.new_zeros(0, *empty.shape)
        return torch.stack(regions)

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
        """Cut ``boxes`` out.

        Args:
            features: pyramid levels, each ``(B, C, h, w)`` float32; those past
                ``featmap_strides`` are not used.
            boxes: ``(B, P, 4)`` float32, x1 y1 x2 y2 in pixels of the input.

        Returns:
            ``(B·P, C, output_size, output_size)`` float32, image by image.
        """
        levels = levels_of(boxes, self.config)
        parts = []
        for level, layer in enumerate(self.roi_layers):
            own = torch.where((levels == level)[..., None], boxes, _ELSEWHERE)
            parts.append(layer(features[level], own))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
