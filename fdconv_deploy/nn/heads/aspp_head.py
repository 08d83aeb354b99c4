"""ASPPHead and DepthwiseSeparableASPPHead of mmsegmentation.

DeepLabV3, https://arxiv.org/abs/1706.05587, and DeepLabV3+, https://arxiv.org/abs/1802.02611.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdconv_deploy.config import ASPPHeadConfig, DepthwiseSeparableASPPHeadConfig
from fdconv_deploy.nn.heads.decode_head import ConvModule, DecodeHead, DepthwiseSeparableConvModule


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


class DepthwiseSeparableASPPHead(ASPPHead):
    """An ASPPHead of depthwise separable convolutions, refined by a finer feature map.

    That map is the backbone's first output, whatever ``in_index`` says, and logits are at
    its size; with ``c1_in_channels=0`` there is none.
    """

    def __init__(self, config: DepthwiseSeparableASPPHeadConfig) -> None:
        super().__init__(config)
        channels, norm = config.channels, config.norm
        self.c1_bottleneck = None
        if config.c1_in_channels > 0:
            self.c1_bottleneck = ConvModule(config.c1_in_channels, config.c1_channels, 1, norm=norm)
        self.sep_bottleneck = nn.Sequential(
            DepthwiseSeparableConvModule(channels + config.c1_channels, channels, norm=norm),
            DepthwiseSeparableConvModule(channels, channels, norm=norm),
        )

    def _branch(self, dilation: int) -> nn.Module:
        if dilation == 1:
            return super()._branch(dilation)
        return DepthwiseSeparableConvModule(
            self.in_channels, self.config.channels, dilation=dilation, norm=self.config.norm
        )

    def features(self, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's outputs -> ``(B, channels, h, w)``."""
        x = super().features(outputs)
        if self.c1_bottleneck is not None:
            fine = self.c1_bottleneck(outputs[0])
            x = torch.cat([self.resize(x, fine), fine], dim=1)
        return self.sep_bottleneck(x)
