"""mmdetection's feature pyramid, without normalisation or activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import FPNConfig
from fdconv_deploy.errors import UnsupportedLayerError


class BareConv(nn.Module):
    """A convolution with bias under the name mmcv's ConvModule gives it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` -> ``(B, O, H, W)``."""
        return self.conv(x)


class FPN(nn.Module):
    """The backbone's maps -> ``num_outs`` maps of ``out_channels``, finest first.

    Levels past the backbone's take every other pixel of the one before, as
    ``add_extra_convs=False`` does.
    """

    def __init__(self, config: FPNConfig) -> None:
        super().__init__()
        if config.num_outs < len(config.in_channels):
            raise UnsupportedLayerError(
                f"the pyramid's num_outs ({config.num_outs}) is below the {len(config.in_channels)}"
                " maps it takes. Expected a level for each map, or more."
            )
        self.config = config
        channels = config.out_channels
        self.lateral_convs = nn.ModuleList(BareConv(n, channels, 1) for n in config.in_channels)
        self.fpn_convs = nn.ModuleList(BareConv(channels, channels, 3) for _ in config.in_channels)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``features``: the backbone's outputs, each ``(B, C, h, w)`` float32, finest first."""
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            finer = maps[i - 1]
            maps[i - 1] = finer + F.interpolate(maps[i], size=finer.shape[-2:], mode="nearest")
        levels = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]
        while len(levels) < self.config.num_outs:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)
