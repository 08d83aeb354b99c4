"""Backbones, one file each."""

from collections.abc import Callable

from torch import nn

from fdconv_deploy.config import (
    BackboneConfig,
    ConvNeXtConfig,
    MixVisionTransformerConfig,
    ResNetConfig,
    SwinTransformerConfig,
)
from fdconv_deploy.nn.backbones.convnext import ConvNeXt
from fdconv_deploy.nn.backbones.mix_vision_transformer import MixVisionTransformer
from fdconv_deploy.nn.backbones.resnet import ResNet
from fdconv_deploy.nn.backbones.swin_transformer import SwinTransformer
from fdconv_deploy.nn.spectrum import FrequencyOrder

_BACKBONES: dict[type[BackboneConfig], Callable[..., nn.Module]] = {
    ResNetConfig: ResNet,
    MixVisionTransformerConfig: MixVisionTransformer,
    SwinTransformerConfig: SwinTransformer,
    ConvNeXtConfig: ConvNeXt,
}


def build_backbone(config: BackboneConfig, frequency_order: FrequencyOrder = "torch") -> nn.Module:
    """A freshly initialised backbone: ``(B, C, H, W)`` -> a tuple of feature maps."""
    return _BACKBONES[type(config)](config, frequency_order)
