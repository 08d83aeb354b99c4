"""Small segmentors of the published kinds, every branch alive."""

from __future__ import annotations

from typing import Any

import torch

from fdconv_deploy.architecture import Architecture, BackboneConfig, FDConvConfig, HeadConfig
from fdconv_deploy.nn import Segmentor, build_segmentor
from tests.reference.lively import enliven_network


def small_segmentor(
    depth: int = 18, base: int = 18, *, seed: int = 0, classes: int = 7, **backbone: Any
) -> Segmentor:
    """A narrow UPerNet; its first stage has plain 3×3 convolutions where ``base`` ≤ 16."""
    conv = backbone.pop("conv", FDConvConfig(kernel_num=4))
    widths = [base * 2**stage * (1 if depth < 50 else 4) for stage in range(4)]
    architecture = Architecture(
        backbone=BackboneConfig(depth=depth, base_channels=base, conv=conv, **backbone),
        decode_head=HeadConfig(
            type="UPerHead",
            in_channels=tuple(widths),
            in_index=(0, 1, 2, 3),
            channels=16,
            num_classes=classes,
        ),
    )
    torch.manual_seed(seed)
    network = build_segmentor(architecture)
    enliven_network(network, seed)
    return network
