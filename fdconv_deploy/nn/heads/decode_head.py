"""What all decode heads have: feature maps to take, convolutions, and the layer that classifies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import DecodeHeadConfig, PSPHeadConfig, UPerHeadConfig


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear resize of ``(B, C, h, w)`` to ``size``, as mmsegmentation does."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


class DecodeHead(nn.Module):
    """A decode head: the backbone's outputs -> logits ``(B, classes, h, w)``.

    A head implements `features`; ``conv_seg`` classifies each position of what it gives.
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

    def resize(self, x: Tensor, like: Tensor) -> Tensor:
        """``x`` at the height and width of ``like``."""
        return resize(x, like.shape[-2:], self.config.align_corners)

    def select(self, outputs: Sequence[Tensor]) -> Tensor:
        """The one feature map that the head takes, or several of them as one.

        With ``input_transform="resize_concat"`` all are brought to the size of the first.
        """
        inputs = [outputs[i] for i in self.config.in_index]
        if self.config.input_transform is None:
            return inputs[0]
        return torch.cat([inputs[0], *(self.resize(x, inputs[0]) for x in inputs[1:])], dim=1)

    def features(self, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's outputs -> ``(B, channels, h, w)``."""
        raise NotImplementedError

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """``outputs``: the backbone's, each ``(B, C, h, w)``."""
        return self.conv_seg(self.features(outputs))


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
    ) -> None:
        super().__init__()
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
        return F.relu(x if self.bn is None else self.bn(x))


class DepthwiseSeparableConvModule(nn.Module):
    """mmcv's: a 3×3 convolution of each channel by itself, then a 1×1 of all of them."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dilation: int = 1, norm: bool = True
    ) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(
            in_channels, in_channels, 3, dilation=dilation, groups=in_channels, norm=norm
        )
        self.pointwise_conv = ConvModule(in_channels, out_channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` -> ``(B, O, H, W)``."""
        return self.pointwise_conv(self.depthwise_conv(x))
