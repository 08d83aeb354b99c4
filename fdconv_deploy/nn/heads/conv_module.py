"""Convolution, normalisation, activation: the unit that decode heads are built of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
