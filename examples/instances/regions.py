"""Regions cut out of feature maps so that gradients pass quickly.

The network's own RoIAlign takes region after region, each a slice of the map; the gradient
of a slice is a whole map of zeros. Here one `grid_sample` serves all regions of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fdconv_deploy.config import RoIConfig
from fdconv_deploy.nn.detection.box_ops import levels_of


def extract(levels: Sequence[Tensor], boxes: Sequence[Tensor], config: RoIConfig) -> Tensor:
    """As the network's RoIExtractor, of regions within their images: ``(R, C, s, s)``.

    Args:
        levels: pyramid levels, each ``(B, C, h, w)``.
        boxes: ``(N, 4)`` of each image.
        config: of the head; ``sampling_ratio`` above 0.
    """
    size, samples = config.output_size, config.sampling_ratio
    parts = []
    for image, own in enumerate(boxes):
        cut = own.new_zeros(len(own), levels[0].shape[1], size, size)
        which = levels_of(own, config)
        for level, stride in enumerate(config.featmap_strides):
            (chosen,) = (which == level).nonzero(as_tuple=True)
            if len(chosen):
                features = levels[level][image : image + 1]
                found = cut_out(features, own[chosen], size, stride, samples)
                cut = cut.index_copy(0, chosen, found)
        parts.append(cut)
    return torch.cat(parts)


def cut_out(features: Tensor, boxes: Tensor, size: int, stride: int, samples: int) -> Tensor:
    """RoIAlign, aligned, of one image's boxes, so that gradients pass: ``(N, C, size, size)``.

    The same numbers as the network's own where boxes stay within the image.

    Args:
        features: ``(1, C, h, w)``, or ``(N, C, h, w)`` for a map of each box's own.
        boxes: ``(N, 4)`` in pixels; a cell of ``features`` is ``stride`` of them.
        size: bins in each direction.
        stride: pixels to a cell.
        samples: points averaged in each direction of a bin.
    """
    channels, height, width = features.shape[1:]
    count, points = len(boxes), size * samples
    steps = (torch.arange(points) + 0.5) / points
    extent = features.new_tensor([width, height]) * stride / 2
    low, high = boxes[:, :2] / extent - 1, boxes[:, 2:] / extent - 1  # -1..1 over the map
    spread = low[:, None] + steps[:, None] * (high - low)[:, None]  # (N, points, 2)
    grid = torch.stack(
        [
            spread[:, None, :, 0].expand(-1, points, -1),
            spread[:, :, None, 1].expand(-1, -1, points),
        ],
        -1,
    )
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}
    if len(features) == 1:
        found = F.grid_sample(features, grid.reshape(1, count * points, points, 2), **options)
        found = found.reshape(channels, count, points, points).transpose(0, 1)
    else:
        found = F.grid_sample(features, grid, **options)
    return F.avg_pool2d(found, samples) if samples > 1 else found
