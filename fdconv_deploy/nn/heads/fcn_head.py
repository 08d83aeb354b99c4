"""FCNHead of mmsegmentation: plain convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdconv_deploy.config import FCNHeadConfig
from fdconv_deploy.nn.heads.decode_head import ConvModule, DecodeHead


class FCNHead(DecodeHead):
    """A few convolutions over one feature map, at its size."""

    def __init__(self, config: FCNHeadConfig) -> None:
        super().__init__(config)
        kernel, norm = config.kernel_size, config.norm
        width = self.in_channels
        modules = []
        for _ in range(config.num_convs):
            modules.append(
                ConvModule(width, config.channels, kernel, dilation=config.dilation, norm=norm)
            )
            width = config.channels
        self.convs: nn.Module = nn.Sequential(*modules) if modules else nn.Identity()
        self.conv_cat = None
        if config.concat_input:
            self.conv_cat = ConvModule(self.in_channels + width, config.channels, kernel, norm=norm)

    def features(self, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's outputs -> ``(B, channels, h, w)``."""
        x = self.select(outputs)
        y = self.convs(x)
        return y if self.conv_cat is None else self.conv_cat(torch.cat([x, y], dim=1))
