"""UPerHead of mmsegmentation: pyramid pooling and a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdconv_deploy.config import UPerHeadConfig
from fdconv_deploy.nn.heads.decode_head import ConvModule, DecodeHead, PyramidPooling


class UPerHead(DecodeHead):
    """Pyramid pooling over the last feature map, then a feature pyramid over all of them.

    Logits are at the size of the first of the feature maps ``in_index`` names.
    """

    def __init__(self, config: UPerHeadConfig) -> None:
        super().__init__(config)
        channels, norm = config.channels, config.norm
        last = config.in_channels[-1]
        self.psp_modules = PyramidPooling(last, config)
        pooled = last + len(config.pool_scales) * channels
        self.bottleneck = ConvModule(pooled, channels, 3, norm=norm)
        self.lateral_convs = nn.ModuleList(
            ConvModule(width, channels, 1, norm=norm) for width in config.in_channels[:-1]
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(channels, channels, 3, norm=norm) for _ in config.in_channels[:-1]
        )
        self.fpn_bottleneck = ConvModule(len(config.in_channels) * channels, channels, 3, norm=norm)

    def features(self, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's outputs -> ``(B, channels, h, w)``."""
        inputs = [outputs[i] for i in self.config.in_index]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs[:-1], strict=True)]
        laterals.append(self.bottleneck(self.psp_modules(inputs[-1])))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + self.resize(laterals[i], laterals[i - 1])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
        levels.append(laterals[-1])
        levels = [levels[0], *(self.resize(level, levels[0]) for level in levels[1:])]
        return self.fpn_bottleneck(torch.cat(levels, dim=1))
