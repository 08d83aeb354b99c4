"""The mask head: which of a region's pixels are the object's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import MaskHeadConfig
from fdconv_deploy.nn.detection.fpn import BareConv


class MaskHead(nn.Module):
    """mmdetection's FCNMaskHead with its deconvolution."""

    def __init__(self, in_channels: int, config: MaskHeadConfig) -> None:
        super().__init__()
        self.config = config
        channels, width = config.conv_out_channels, in_channels
        self.convs = nn.ModuleList()
        for _ in range(config.num_convs):
            self.convs.append(BareConv(width, channels, config.conv_kernel_size))
            width = channels
        self.upsample = nn.ConvTranspose2d(width, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(
            channels, 1 if config.class_agnostic else config.num_classes, 1
        )

    def forward(self, regions: Tensor) -> Tensor:
        """``(R, C, s, s)`` float32 -> logits ``(R, classes or 1, 2s, 2s)``."""
        x = regions
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.conv_logits(F.relu(self.upsample(x)))
