"""The decode heads of mmsegmentation that FDConv checkpoints come with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.architecture import HeadConfig


class ConvModule(nn.Module):
    """Convolution without bias, batch normalisation, ReLU: mmcv's, by its key names."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: int = 0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, 1, padding, dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` -> ``(B, O, H, W)``."""
        return F.relu(self.bn(self.conv(x)))


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear resize of ``(B, C, h, w)`` to ``size``, as mmsegmentation does."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


class UPerHead(nn.Module):
    """Pyramid pooling over the last feature map, then a feature pyramid over all of them.

    ``features``, one per ``in_index`` -> logits ``(B, classes, h, w)`` at the first one's size.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        last = config.in_channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(last, channels, 1))
            for scale in config.pool_scales
        )
        pooled = last + len(config.pool_scales) * channels
        self.bottleneck = ConvModule(pooled, channels, 3, padding=1)
        self.lateral_convs = nn.ModuleList(
            ConvModule(width, channels, 1) for width in config.in_channels[:-1]
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(channels, channels, 3, padding=1) for _ in config.in_channels[:-1]
        )
        self.fpn_bottleneck = ConvModule(len(config.in_channels) * channels, channels, 3, padding=1)
        self.conv_seg = nn.Conv2d(channels, config.num_classes, 1)

    def _pyramid_pooling(self, x: Tensor) -> Tensor:
        align = self.config.align_corners
        pooled = [resize(module(x), x.shape[-2:], align) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """``features``: the backbone's outputs, each ``(B, C, h, w)``."""
        align = self.config.align_corners
        inputs = [features[i] for i in self.config.in_index]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs[:-1], strict=True)]
        laterals.append(self._pyramid_pooling(inputs[-1]))
        for i in range(len(laterals) - 1, 0, -1):
            finer = laterals[i - 1]
            laterals[i - 1] = finer + resize(laterals[i], finer.shape[-2:], align)
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
        levels.append(laterals[-1])
        size = levels[0].shape[-2:]
        levels = [levels[0], *(resize(level, size, align) for level in levels[1:])]
        return self.conv_seg(self.fpn_bottleneck(torch.cat(levels, dim=1)))


class FCNHead(nn.Module):
    """A few convolutions over one feature map: logits ``(B, classes, h, w)`` at its size."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        padding = config.kernel_size // 2 * config.dilation
        width = config.in_channels[0]
        modules = []
        for _ in range(config.num_convs):
            modules.append(
                ConvModule(width, config.channels, config.kernel_size, padding, config.dilation)
            )
            width = config.channels
        self.convs: nn.Module = nn.Sequential(*modules) if modules else nn.Identity()
        if config.concat_input:
            self.conv_cat = ConvModule(
                config.in_channels[0] + width,
                config.channels,
                config.kernel_size,
                padding=config.kernel_size // 2,
            )
        self.conv_seg = nn.Conv2d(config.channels, config.num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """``features``: the backbone's outputs, each ``(B, C, h, w)``."""
        x = features[self.config.in_index[0]]
        y = self.convs(x)
        if self.config.concat_input:
            y = self.conv_cat(torch.cat([x, y], dim=1))
        return self.conv_seg(y)


def build_head(config: HeadConfig) -> UPerHead | FCNHead:
    """The head a config names."""
    return UPerHead(config) if config.type == "UPerHead" else FCNHead(config)
