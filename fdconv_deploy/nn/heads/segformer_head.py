"""SegformerHead of mmsegmentation (SegFormer, https://arxiv.org/abs/2105.15203)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdconv_deploy.config import SegformerHeadConfig
from fdconv_deploy.nn.heads.decode_head import ConvModule, DecodeHead


class SegformerHead(DecodeHead):
    """A 1×1 convolution of each feature map, and one of all of them at the size of the first.

    They are joined in the order of ``in_index``; NVIDIA's own code has the opposite one.
    """

    def __init__(self, config: SegformerHeadConfig) -> None:
        super().__init__(config)
        channels, norm = config.channels, config.norm
        self.convs = nn.ModuleList(
            ConvModule(width, channels, 1, norm=norm) for width in config.in_channels
        )
        joined = channels * len(config.in_channels)
        self.fusion_conv = ConvModule(joined, channels, 1, norm=norm)

    def features(self, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's outputs -> ``(B, channels, h, w)``."""
        inputs = [outputs[i] for i in self.config.in_index]
        maps = [conv(x) for conv, x in zip(self.convs, inputs, strict=True)]
        maps = [maps[0], *(self.resize(x, maps[0]) for x in maps[1:])]
        return self.fusion_conv(torch.cat(maps, dim=1))
