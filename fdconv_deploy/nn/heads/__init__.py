"""The decode heads of mmsegmentation that FDConv checkpoints come with."""

from __future__ import annotations

from fdconv_deploy.config import DecodeHeadConfig, Mask2FormerHeadConfig, MaskDINOHeadConfig
from fdconv_deploy.nn.heads import decode_heads
from fdconv_deploy.nn.heads.decode_heads import DecodeHead, resize
from fdconv_deploy.nn.heads.mask2former_head import Mask2FormerHead
from fdconv_deploy.nn.heads.maskdino_head import MaskDINOHead
from fdconv_deploy.nn.heads.query_head import QueryHead
from fdconv_deploy.nn.spectrum import FrequencyOrder

__all__ = ["DecodeHead", "QueryHead", "build_head", "resize"]


def build_head(
    config: DecodeHeadConfig, frequency_order: FrequencyOrder = "torch"
) -> DecodeHead | QueryHead:
    """The head a config names."""
    if isinstance(config, Mask2FormerHeadConfig):
        return Mask2FormerHead(config, frequency_order)
    if isinstance(config, MaskDINOHeadConfig):
        return MaskDINOHead(config, frequency_order)
    return getattr(decode_heads, config.type)(config)
