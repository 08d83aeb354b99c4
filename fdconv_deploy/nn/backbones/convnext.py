"""ConvNeXt as mmpretrain builds it, its blocks' two pointwise layers FDConv or plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdconv_deploy.config import ConvNeXtConfig
from fdconv_deploy.nn.fdconv import conv_or_fdconv, linear_or_fdconv
from fdconv_deploy.nn.spectrum import FrequencyOrder

EPSILON = 1e-6
EXPANSION = 4


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, H, W)``, at each position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7×7, norm, 1×1, GELU, 1×1, times gamma, and a shortcut."""

    def __init__(self, config: ConvNeXtConfig, channels: int, order: FrequencyOrder) -> None:
        super().__init__()
        self.linear = config.linear_pw_conv
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        norm = nn.LayerNorm if self.linear else ChannelNorm
        self.norm = norm(channels, EPSILON)
        pointwise = linear_or_fdconv if self.linear else conv_or_fdconv
        hidden = EXPANSION * channels
        self.pointwise_conv1 = pointwise(config.conv, channels, hidden, order=order)
        self.act = nn.GELU()
        self.pointwise_conv2 = pointwise(config.conv, hidden, channels, order=order)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the same shape."""
        y = self.depthwise_conv(x)
        if self.linear:
            y = y.permute(0, 2, 3, 1)
        y = self.pointwise_conv2(self.act(self.pointwise_conv1(self.norm(y))))
        y = (y * self.gamma).permute(0, 3, 1, 2) if self.linear else y * self.gamma[:, None, None]
        return x + y


class ConvNeXt(nn.Module):
    """``(B, in_channels, H, W)`` -> one feature map per entry of ``config.out_indices``.

    Nothing is padded: a map has ⌊H/4⌋ rows, then half of them, rounded down.
    """

    def __init__(self, config: ConvNeXtConfig, order: FrequencyOrder = "torch") -> None:
        super().__init__()
        self.config = config
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        before = config.in_channels
        for stage, channels in enumerate(config.channels):
            if stage == 0:
                size = config.stem_patch_size
                layers = [nn.Conv2d(before, channels, size, size), ChannelNorm(channels, EPSILON)]
            else:
                layers = [ChannelNorm(before, EPSILON), nn.Conv2d(before, channels, 2, 2)]
            self.downsample_layers.append(nn.Sequential(*layers))
            blocks = [Block(config, channels, order) for _ in range(config.depths[stage])]
            self.stages.append(nn.Sequential(*blocks))
            if stage in config.out_indices:
                self.add_module(f"norm{stage}", ChannelNorm(channels, EPSILON))
            before = channels

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x``: ``(B, in_channels, H, W)`` float32."""
        features = []
        for index, (downsample, stage) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            x = stage(downsample(x))
            if index in self.config.out_indices:
                features.append(self.get_submodule(f"norm{index}")(x))
        return tuple(features)
