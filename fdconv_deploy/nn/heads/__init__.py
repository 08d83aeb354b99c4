"""The decode heads of mmsegmentation that FDConv checkpoints come with."""

from __future__ import annotations

from fdconv_deploy.config import DecodeHeadConfig, HeadType
from fdconv_deploy.nn.heads.aspp_head import ASPPHead, DepthwiseSeparableASPPHead
from fdconv_deploy.nn.heads.decode_head import DecodeHead, resize
from fdconv_deploy.nn.heads.fcn_head import FCNHead
from fdconv_deploy.nn.heads.psp_head import PSPHead
from fdconv_deploy.nn.heads.segformer_head import SegformerHead
from fdconv_deploy.nn.heads.uper_head import UPerHead

__all__ = ["DecodeHead", "build_head", "resize"]

_HEADS: dict[HeadType, type[DecodeHead]] = {
    "UPerHead": UPerHead,
    "SegformerHead": SegformerHead,
    "FCNHead": FCNHead,
    "PSPHead": PSPHead,
    "ASPPHead": ASPPHead,
    "DepthwiseSeparableASPPHead": DepthwiseSeparableASPPHead,
}


def build_head(config: DecodeHeadConfig) -> DecodeHead:
    """The head a config names."""
    return _HEADS[config.type](config)
