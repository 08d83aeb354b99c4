"""Backbones, one file each."""

from torch import nn

from fdconv_deploy.config import (
    BackboneConfig,
    ConvNeXtConfig,
    MixVisionTransformerConfig,
    ResNetConfig,
    SwinTransformerConfig,
)
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.backbones.convnext import ConvNeXt
from fdconv_deploy.nn.backbones.mix_vision_transformer import MixVisionTransformer
from fdconv_deploy.nn.backbones.resnet import ResNet
from fdconv_deploy.nn.backbones.swin_transformer import SwinTransformer
from fdconv_deploy.nn.spectrum import FrequencyOrder


def build_backbone(config: BackboneConfig, frequency_order: FrequencyOrder = "torch") -> nn.Module:
    """A freshly initialised backbone: ``(B, C, H, W)`` -> a tuple of feature maps.

    Raises:
        UnsupportedLayerError: the configuration describes none.
    """
    match config:
        case ResNetConfig():
            return ResNet(config, frequency_order)
        case MixVisionTransformerConfig():
            return MixVisionTransformer(config, frequency_order)
        case SwinTransformerConfig():
            return SwinTransformer(config, frequency_order)
        case ConvNeXtConfig():
            return ConvNeXt(config, frequency_order)
    raise UnsupportedLayerError(f"there is no backbone for a {type(config).__name__}.")
