"""ResNet as mmsegmentation builds it, its blocks' convolutions FDConv layers or plain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import RESNET_BLOCKS, ResNetConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.fdconv import conv_or_fdconv
from fdconv_deploy.nn.spectrum import FrequencyOrder

Conv = Callable[..., nn.Conv2d]


class Block(nn.Module):
    """Convolutions in a row, each with its norm, and a shortcut: a basic block or a bottleneck."""

    def __init__(self, convolutions: Sequence[nn.Conv2d], downsample: nn.Module | None) -> None:
        super().__init__()
        self.depth = len(convolutions)
        for place, conv in enumerate(convolutions, 1):
            self.add_module(f"conv{place}", conv)
            self.add_module(f"bn{place}", nn.BatchNorm2d(conv.out_channels))
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` -> ``(B, O, H/stride, W/stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        for place in range(1, self.depth + 1):
            x = self.get_submodule(f"bn{place}")(self.get_submodule(f"conv{place}")(x))
            x = F.relu(x if place < self.depth else x + shortcut)
        return x


def _convolutions(
    conv: Conv, config: ResNetConfig, channels: tuple[int, int, int], stride: int, dilation: int
) -> list[nn.Conv2d]:
    """A block's: two 3×3, or 1×1, 3×3, 1×1; ``channels`` are those in, inside and out."""
    into, width, out = channels
    if RESNET_BLOCKS[config.depth][0] == "basic":
        return [conv(into, width, 3, stride, dilation), conv(width, width, 3)]
    # The 3×3 strides in pytorch style, the first 1×1 in caffe's.
    first, second = (stride, 1) if config.style == "caffe" else (1, stride)
    return [
        conv(into, width, 1, first),
        conv(width, width, 3, second, dilation),
        conv(width, out, 1),
    ]


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

    def __init__(self, config: ResNetConfig, order: FrequencyOrder = "torch") -> None:
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
        _, depths = RESNET_BLOCKS[config.depth]
        if config.multi_grid is not None and len(config.multi_grid) != depths[stages - 1]:
            raise UnsupportedLayerError(
                f"multi_grid needs one dilation for each of the {depths[stages - 1]} blocks of the "
                f"last stage, got {config.multi_grid}."
            )
        self.config = config
        conv = partial(conv_or_fdconv, config.conv, order=order, bias=False)
        stem = config.stem_channels or config.base_channels
        self._build_stem(conv, stem)
        channels = stem
        for stage in range(stages):
            width = config.base_channels * 2**stage
            stride, dilation = config.strides[stage], config.dilations[stage]
            spread = [dilation] * depths[stage]
            if config.contract_dilation and dilation > 1:
                spread[0] = dilation // 2
            if config.multi_grid is not None and stage == stages - 1:
                spread = list(config.multi_grid)
            blocks, out = [], config.widths[stage]
            for index, spacing in enumerate(spread):
                first = index == 0
                step = stride if first else 1
                shortcut = _downsample(channels, out, step, config.avg_down) if first else None
                sizes = channels, width, out
                blocks.append(Block(_convolutions(conv, config, sizes, step, spacing), shortcut))
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def _build_stem(self, conv: Conv, stem: int) -> None:
        config = self.config
        if not config.deep_stem:
            # A 7×7 is never dynamic.
            self.conv1 = nn.Conv2d(config.in_channels, stem, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(stem)
            return
        layers: list[nn.Module] = []
        widths = (config.in_channels, stem // 2, stem // 2, stem)
        for (into, out), stride in zip(pairwise(widths), (2, 1, 1), strict=True):
            layers += [conv(into, out, 3, stride), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages in order."""
        names = (f"layer{number + 1}" for number in range(self.config.num_stages))
        return [cast(nn.Sequential, self.get_submodule(name)) for name in names]

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
