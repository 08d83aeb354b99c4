"""Regions cut out of the pyramid level that suits their size: SingleRoIExtractor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdconv_deploy.config import RoIConfig
from fdconv_deploy.nn.detection.roi_align import RoIAlign

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
