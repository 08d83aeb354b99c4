"""The decode heads of mmsegmentation that FDConv checkpoints come with."""

from __future__ import annotations

from fdconv_deploy.config import (
    DecodeHeadConfig,
    HeadType,
    Mask2FormerHeadConfig,
    MaskDINOHeadConfig,
)
from fdconv_deploy.nn.heads.decode_heads import (
    ASPPHead,
    DecodeHead,
    DepthwiseSeparableASPPHead,
    FCNHead,
    PSPHead,
    SegformerHead,
    UPerHead,
    resize,
)
from fdconv_deploy.nn.heads.mask2former_head import Mask2FormerHead
from fdconv_deploy.nn.heads.maskdino_head import MaskDINOHead
from fdconv_deploy.nn.heads.query_head import QueryHead
from fdconv_deploy.nn.spectrum import FrequencyOrder

__all__ = ["DecodeHead", "QueryHead", "build_head", "resize"]

_HEADS: dict[HeadType, type[DecodeHead]] = {
    "UPerHead": UPerHead,
    "SegformerHead": SegformerHead,
    "FCNHead": FCNHead,
    "PSPHead": PSPHead,
    "ASPPHead": ASPPHead,
    "DepthwiseSeparableASPPHead": DepthwiseSeparableASPPHead,
}


def build_head(
    config: DecodeHeadConfig, frequency_order: FrequencyOrder = "torch"
) -> DecodeHead | QueryHead:
    """The head a config names."""
    if isinstance(config, Mask2FormerHeadConfig):
        return Mask2FormerHead(config, frequency_order)
    if isinstance(config, MaskDINOHeadConfig):
        return MaskDINOHead(config, frequency_order)
    return _HEADS[config.type](config)
