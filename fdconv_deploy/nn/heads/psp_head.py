"""PSPHead of mmsegmentation (PSPNet, https://arxiv.org/abs/1612.01105)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fdconv_deploy.config import PSPHeadConfig
from fdconv_deploy.nn.heads.decode_head import ConvModule, DecodeHead, PyramidPooling


class PSPHead(DecodeHead):
    """Pyramid pooling over one feature map, at its size."""

    def __init__(self, config: PSPHeadConfig) -> None:
        super().__init__(config)
        self.psp_modules = PyramidPooling(self.in_channels, config)
        pooled = self.in_channels + len(config.pool_scales) * config.channels
        self.bottleneck = ConvModule(pooled, config.channels, 3, norm=config.norm)

    def features(self, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's outputs -> ``(B, channels, h, w)``."""
        return self.bottleneck(self.psp_modules(self.select(outputs)))
