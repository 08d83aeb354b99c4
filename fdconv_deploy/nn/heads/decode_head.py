"""What all decode heads have: which feature maps they take, and the layer that classifies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import DecodeHeadConfig, PSPHeadConfig, UPerHeadConfig
from fdconv_deploy.nn.heads.conv_module import ConvModule


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
