"""ASPPHead of mmsegmentation (DeepLabV3, https://arxiv.org/abs/1706.05587)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdconv_deploy.config import ASPPHeadConfig, DepthwiseSeparableASPPHeadConfig
from fdconv_deploy.nn.heads.conv_module import ConvModule
from fdconv_deploy.nn.heads.decode_head import DecodeHead


class ASPPHead(DecodeHead):
    """Convolutions of several dilations side by side, and the average of the whole map.

    A branch of dilation 1 is a 1×1 convolution, the others are 3×3.
    """

    def __init__(self, config: ASPPHeadConfig | DepthwiseSeparableASPPHeadConfig) -> None:
        super().__init__(config)
        channels, norm = config.channels, config.norm
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), ConvModule(self.in_channels, channels, 1, norm=norm)
        )
        self.aspp_modules = nn.ModuleList(self._branch(d) for d in config.dilations)
        branches = 1 + len(config.dilations)
        self.bottleneck = ConvModule(branches * channels, channels, 3, norm=norm)

    def _branch(self, dilation: int) -> nn.Module:
        kernel = 1 if dilation == 1 else 3
        return ConvModule(
            self.in_channels,
            self.config.channels,
            kernel,
            dilation=dilation,
            norm=self.config.norm,
        )

    def features(self, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's outputs -> ``(B, channels, h, w)``."""
        x = self.select(outputs)
        branches = [self.resize(self.image_pool(x), x), *(conv(x) for conv in self.aspp_modules)]
        return self.bottleneck(torch.cat(branches, dim=1))
