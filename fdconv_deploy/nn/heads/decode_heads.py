"""The convolutional decode heads of mmsegmentation, and what they are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import (
    ASPPHeadConfig,
    DecodeHeadConfig,
    DepthwiseSeparableASPPHeadConfig,
    FCNHeadConfig,
    PSPHeadConfig,
    SegformerHeadConfig,
    UPerHeadConfig,
)


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear resize of ``(B, C, h, w)`` to ``size``, as mmsegmentation does."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


class DecodeHead(nn.Module):
    """A decode head: the backbone's outputs -> logits ``(B, classes, h, w)``.

    A head implements `_features`; ``conv_seg`` classifies each position of what it gives.
    Dropout does nothing at inference and is left out.
    """

    def __init__(self, config: DecodeHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_seg = nn.Conv2d(config.channels, config.outputs, 1)

    @property
    def in_channels(self) -> int:
        """Channels of what `select` gives."""
        return sum(self.config.in_channels)

    def conv(self, in_channels: int, kernel_size: int, dilation: int = 1) -> ConvModule:
        """A convolution onto the head's own channels."""
        channels, norm = self.config.channels, self.config.norm
        return ConvModule(in_channels, channels, kernel_size, dilation=dilation, norm=norm)

    def resize(self, x: Tensor, like: Tensor) -> Tensor:
        """``x`` at the height and width of ``like``."""
        return resize(x, like.shape[-2:], self.config.align_corners)

    def join(self, maps: Sequence[Tensor]) -> Tensor:
        """All maps side by side, at the size of the first."""
        return torch.cat([maps[0], *(self.resize(x, maps[0]) for x in maps[1:])], dim=1)

    def select(self, outputs: Sequence[Tensor]) -> Tensor:
        """The one feature map that the head takes, or several of them as one."""
        inputs = [outputs[i] for i in self.config.in_index]
        return inputs[0] if self.config.input_transform is None else self.join(inputs)

    def _features(self, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's outputs -> ``(B, channels, h, w)``."""
        raise NotImplementedError

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """``outputs``: the backbone's, each ``(B, C, h, w)``."""
        return self.conv_seg(self._features(outputs))


class PyramidPooling(nn.ModuleList):
    """PSPNet's pyramid: averages over 1×1, 2×2 … windows, each through a 1×1 convolution.

    ``(B, C, H, W)`` -> ``x`` and every level at its size, ``(B, C + levels · channels, H, W)``.
    """

    def __init__(self, in_channels: int, config: UPerHeadConfig | PSPHeadConfig) -> None:
        super().__init__(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(scale),
                ConvModule(in_channels, config.channels, 1, norm=config.norm),
            )
            for scale in config.pool_scales
        )
        self.align_corners = config.align_corners

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(B, C, H, W)``."""
        levels = [resize(level(x), x.shape[-2:], self.align_corners) for level in self]
        return torch.cat([x, *levels], dim=1)


class ConvModule(nn.Module):
    """mmcv's ConvModule by its key names: convolution, batch normalisation, ReLU.

    An odd kernel keeps the size. The convolution has a bias only where there is no normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        groups: int = 1,
        norm: bool = True,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2 * dilation,
            dilation=dilation,
            groups=groups,
            bias=not norm,
        )
        self.bn = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` -> ``(B, O, H, W)``."""
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return F.relu(x) if self.relu else x


def depthwise_separable(
    in_channels: int, out_channels: int, *, dilation: int = 1, norm: bool = True
) -> nn.Sequential:
    """Mmcv's module: a 3×3 convolution of each channel by itself, then a 1×1 of all of them."""
    depthwise = ConvModule(
        in_channels, in_channels, 3, dilation=dilation, groups=in_channels, norm=norm
    )
    pointwise = ConvModule(in_channels, out_channels, 1, norm=norm)
    return nn.Sequential(OrderedDict(depthwise_conv=depthwise, pointwise_conv=pointwise))


class FCNHead(DecodeHead):
    """FCN: a few convolutions over one feature map, at its size."""

    def __init__(self, config: FCNHeadConfig) -> None:
        super().__init__(config)
        kernel, width = config.kernel_size, self.in_channels
        self.convs = nn.Sequential()
        for _ in range(config.num_convs):
            self.convs.append(self.conv(width, kernel, config.dilation))
            width = config.channels
        self.conv_cat = None
        if config.concat_input:
            self.conv_cat = self.conv(self.in_channels + width, kernel)

    def _features(self, outputs: Sequence[Tensor]) -> Tensor:
        x = self.select(outputs)
        y = self.convs(x)
        return y if self.conv_cat is None else self.conv_cat(torch.cat([x, y], dim=1))


class PSPHead(DecodeHead):
    """PSPNet (https://arxiv.org/abs/1612.01105): pyramid pooling over one map, at its size."""

    def __init__(self, config: PSPHeadConfig) -> None:
        super().__init__(config)
        self.psp_modules = PyramidPooling(self.in_channels, config)
        pooled = self.in_channels + len(config.pool_scales) * config.channels
        self.bottleneck = self.conv(pooled, 3)

    def _features(self, outputs: Sequence[Tensor]) -> Tensor:
        return self.bottleneck(self.psp_modules(self.select(outputs)))


class UPerHead(DecodeHead):
    """UPerNet: pyramid pooling over the last feature map, then a feature pyramid over all of them.

    Logits are at the size of the first of the feature maps ``in_index`` names.
    """

    def __init__(self, config: UPerHeadConfig) -> None:
        super().__init__(config)
        channels = config.channels
        *finer, last = config.in_channels
        self.psp_modules = PyramidPooling(last, config)
        self.bottleneck = self.conv(last + len(config.pool_scales) * channels, 3)
        self.lateral_convs = nn.ModuleList(self.conv(width, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(self.conv(channels, 3) for _ in finer)
        self.fpn_bottleneck = self.conv(len(config.in_channels) * channels, 3)

    def _features(self, outputs: Sequence[Tensor]) -> Tensor:
        inputs = [outputs[i] for i in self.config.in_index]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs[:-1], strict=True)]
        laterals.append(self.bottleneck(self.psp_modules(inputs[-1])))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + self.resize(laterals[i], laterals[i - 1])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
        levels.append(laterals[-1])
        return self.fpn_bottleneck(self.join(levels))


class SegformerHead(DecodeHead):
    """A 1×1 convolution of each feature map, and one of all of them at the size of the first.

    SegFormer, https://arxiv.org/abs/2105.15203.
    They are joined in the order of ``in_index``; NVIDIA's own code has the opposite one.
    """

    def __init__(self, config: SegformerHeadConfig) -> None:
        super().__init__(config)
        self.convs = nn.ModuleList(self.conv(width, 1) for width in config.in_channels)
        self.fusion_conv = self.conv(config.channels * len(config.in_channels), 1)

    def _features(self, outputs: Sequence[Tensor]) -> Tensor:
        inputs = [outputs[i] for i in self.config.in_index]
        maps = [conv(x) for conv, x in zip(self.convs, inputs, strict=True)]
        return self.fusion_conv(self.join(maps))


class ASPPHead(DecodeHead):
    """Convolutions of several dilations side by side, and the average of the whole map.

    DeepLabV3, https://arxiv.org/abs/1706.05587; with a finer map DeepLabV3+,
    https://arxiv.org/abs/1802.02611.
    A branch of dilation 1 is a 1×1 convolution, the others are 3×3.
    """

    def __init__(self, config: ASPPHeadConfig | DepthwiseSeparableASPPHeadConfig) -> None:
        super().__init__(config)
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), self.conv(self.in_channels, 1))
        self.aspp_modules = nn.ModuleList(self._branch(d) for d in config.dilations)
        self.bottleneck = self.conv((1 + len(config.dilations)) * config.channels, 3)

    def _branch(self, dilation: int) -> nn.Module:
        return self.conv(self.in_channels, 1 if dilation == 1 else 3, dilation)

    def _features(self, outputs: Sequence[Tensor]) -> Tensor:
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
            depthwise_separable(channels + config.c1_channels, channels, norm=norm),
            depthwise_separable(channels, channels, norm=norm),
        )

    def _branch(self, dilation: int) -> nn.Module:
        if dilation == 1:
            return super()._branch(dilation)
        return depthwise_separable(
            self.in_channels, self.config.channels, dilation=dilation, norm=self.config.norm
        )

    def _features(self, outputs: Sequence[Tensor]) -> Tensor:
        x = super()._features(outputs)
        if self.c1_bottleneck is not None:
            fine = self.c1_bottleneck(outputs[0])
            x = torch.cat([self.resize(x, fine), fine], dim=1)
        return self.sep_bottleneck(x)
