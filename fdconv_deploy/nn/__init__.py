"""The published network, exact, in PyTorch."""

from fdconv_deploy.nn.backbones.resnet import ResNet
from fdconv_deploy.nn.fdconv import FDConv2d, FDLinear, FDTokenConv
from fdconv_deploy.nn.from_published import from_published
from fdconv_deploy.nn.replace import replace_convolutions, replace_linears
from fdconv_deploy.nn.segmentor import Segmentor

__all__ = [
    "FDConv2d",
    "FDLinear",
    "FDTokenConv",
    "ResNet",
    "Segmentor",
    "from_published",
    "replace_convolutions",
    "replace_linears",
]
