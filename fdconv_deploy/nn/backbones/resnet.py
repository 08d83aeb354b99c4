"""ResNet as mmsegmentation builds it, its blocks' convolutions FDConv layers or plain."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import RESNET_BLOCKS, FDConvConfig, ResNetConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.fdconv import FDConv2d, fdconv_arguments
from fdconv_deploy.nn.spectrum import FrequencyOrder


class ConvFactory:
    """Builds a block's convolution, bias-free: FDConv where a config is given, else plain."""

    def __init__(self, config: FDConvConfig | None, order: FrequencyOrder = "torch") -> None:
        self.config, self.order = config, order

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> nn.Conv2d:
        """A convolution that keeps the size at stride 1."""
        padding = dilation * (kernel_size // 2)
        if self.config is None:
            return nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False
            )
        return FDConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=False,
            **fdconv_arguments(self.config, self.order),
        )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; the first one strides and dilates."""

    def __init__(
        self,
        conv: ConvFactory,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        style: str,
        downsample: nn.Module | None,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride, dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` -> ``(B, channels, H/stride, W/stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 and a shortcut. The 3×3 strides in pytorch style, the first in caffe."""

    def __init__(
        self,
        conv: ConvFactory,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        style: str,
        downsample: nn.Module | None,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if style == "caffe" else (1, stride)
        self.conv1 = conv(in_channels, channels, 1, first)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, second, dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` -> ``(B, out_channels, H/stride, W/stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


def _downsample(
    in_channels: int, out_channels: int, stride: int, average: bool
) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    layers: list[nn.Module] = []
    if average:
        # At stride 1 too, where it does nothing but shift the names in the checkpoint.
        layers.append(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
        stride = 1
    # The published network keeps shortcuts plain.
    layers.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
    layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers)


class ResNet(nn.Module):
    """``(B, in_channels, H, W)`` -> one feature map per entry of ``config.out_indices``."""

    def __init__(self, config: ResNetConfig, frequency_order: FrequencyOrder = "torch") -> None:
        super().__init__()
        if config.depth not in RESNET_BLOCKS:
            raise UnsupportedLayerError(
                f"ResNet depth must be one of {sorted(RESNET_BLOCKS)}, got {config.depth}."
            )
        stages = config.num_stages
        if len(config.strides) < stages or len(config.dilations) < stages:
            raise UnsupportedLayerError(
                f"strides and dilations need one entry for each of the {stages} stages, got "
                f"{config.strides} and {config.dilations}."
            )
        if not config.out_indices or max(config.out_indices) >= stages:
            raise UnsupportedLayerError(
                f"out_indices {config.out_indices} must name some of the stages 0…{stages - 1}."
            )
        kind, depths = RESNET_BLOCKS[config.depth]
        if config.multi_grid is not None and len(config.multi_grid) != depths[stages - 1]:
            raise UnsupportedLayerError(
                f"multi_grid needs one dilation for each of the {depths[stages - 1]} blocks of the "
                f"last stage, got {config.multi_grid}."
            )
        self.config = config
        conv = ConvFactory(config.conv, frequency_order)
        stem = config.stem_channels or config.base_channels
        self._build_stem(conv, stem)
        block = BasicBlock if kind == "basic" else Bottleneck

        channels = stem
        for stage in range(stages):
            width = config.base_channels * 2**stage
            stride, dilation = config.strides[stage], config.dilations[stage]
            spread = [dilation] * depths[stage]
            if config.contract_dilation and dilation > 1:
                spread[0] = dilation // 2
            if config.multi_grid is not None and stage == stages - 1:
                spread = list(config.multi_grid)
            blocks = []
            for index in range(depths[stage]):
                first = index == 0
                step = stride if first else 1
                out = config.widths[stage]
                shortcut = _downsample(channels, out, step, config.avg_down) if first else None
                blocks.append(
                    block(conv, channels, width, out, step, spread[index], config.style, shortcut)
                )
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def _build_stem(self, conv: ConvFactory, stem: int) -> None:
        config = self.config
        if not config.deep_stem:
            # A 7×7 is never dynamic.
            self.conv1 = nn.Conv2d(config.in_channels, stem, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(stem)
            return
        layers: list[nn.Module] = []
        sizes = [
            (config.in_channels, stem // 2, 2),
            (stem // 2, stem // 2, 1),
            (stem // 2, stem, 1),
        ]
        for into, out, stride in sizes:
            layers += [conv(into, out, 3, stride), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages in order."""
        return [
            cast(nn.Sequential, getattr(self, f"layer{i + 1}"))
            for i in range(self.config.num_stages)
        ]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x``: ``(B, in_channels, H, W)`` float32."""
        x = self.stem(x) if self.config.deep_stem else F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.config.out_indices:
                features.append(x)
        return tuple(features)
