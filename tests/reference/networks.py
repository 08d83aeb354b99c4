"""Small networks, every branch alive: segmentors of the published kinds, and any wiring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import lively_heads
from fdconv_deploy.config import (
    BoxHeadConfig,
    DetectorConfig,
    DetectorTestConfig,
    FDConvConfig,
    FPNConfig,
    MaskHeadConfig,
    RCNNTestConfig,
    ResNetConfig,
    RPNHeadConfig,
    RPNTestConfig,
    SegmentorConfig,
    TestMode,
    UPerHeadConfig,
)
from fdconv_deploy.nn import FDConv2d, Segmentor
from fdconv_deploy.nn.detection import Detector
from tests.reference.lively import enliven, enliven_network, lively_input, seeded


def small_segmentor(
    depth: int = 18,
    base: int = 18,
    *,
    seed: int = 0,
    stages: int = 4,
    test: TestMode | None = None,
    **backbone: Any,
) -> Segmentor:
    """A narrow UPerNet of 7 classes."""
    conv = backbone.pop("conv", FDConvConfig(kernel_num=4))
    widths = [base * 2**stage * (1 if depth < 50 else 4) for stage in range(stages)]
    indices = tuple(range(stages))
    architecture = SegmentorConfig(
        backbone=ResNetConfig(
            depth=depth,
            base_channels=base,
            conv=conv,
            num_stages=stages,
            out_indices=indices,
            **backbone,
        ),
        decode_head=UPerHeadConfig(
            in_channels=tuple(widths),
            in_index=indices,
            channels=16,
            num_classes=7,
        ),
        test=test or TestMode(),
    )
    torch.manual_seed(seed)
    network = Segmentor(architecture)
    enliven_network(network, seed)
    return network


def small_detector(
    base: int = 18, *, masks: bool = True, classes: int = 5, seed: int = 0, **backbone: Any
) -> Detector:
    """A narrow detector over a ResNet-18 that finds something; D = 20."""
    conv = backbone.pop("conv", FDConvConfig(kernel_num=4))
    architecture = DetectorConfig(
        backbone=ResNetConfig(depth=18, base_channels=base, conv=conv, **backbone),
        neck=FPNConfig(in_channels=tuple(base * 2**i for i in range(4)), out_channels=24),
        rpn_head=RPNHeadConfig(feat_channels=24),
        bbox_head=BoxHeadConfig(num_classes=classes, fc_out_channels=32),
        mask_head=MaskHeadConfig(num_classes=classes, num_convs=2, conv_out_channels=12)
        if masks
        else None,
        test=DetectorTestConfig(
            rpn=RPNTestConfig(nms_pre=100, max_per_img=60), rcnn=RCNNTestConfig(max_per_img=20)
        ),
    )
    torch.manual_seed(seed)
    network = Detector(architecture)
    enliven_network(network.backbone, seed)
    return lively_heads(network, lively_input((2, 3, 96, 128), seed))


class Wired(nn.Module):
    """Modules and a function of them: ``wiring(self, x)``."""

    def __init__(self, wiring: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


def dynamic(seed: int = 0, stride: int = 1, channels: int = 18) -> FDConv2d:
    """A 3×3 layer that keeps ``channels``."""
    return enliven(FDConv2d(channels, channels, 3, stride, 1, kernel_num=3), seed)


@torch.no_grad()
def batch_norm(channels: int, *, affine: bool = True, seed: int = 0) -> nn.BatchNorm2d:
    """One that does something, in eval mode."""
    norm = nn.BatchNorm2d(channels, eps=1e-3, affine=affine).eval()
    generator = seeded(seed)
    norm.running_mean.copy_(torch.randn(channels, generator=generator))
    norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.1)
    if affine:
        norm.weight.copy_(torch.randn(channels, generator=generator))
        norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm
