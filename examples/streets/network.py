"""The two networks: what they are made of, and how they go on from their base."""

from __future__ import annotations

from torch import Tensor, nn

from examples.streets.scenes import CLASSES, PALETTE
from examples.training.layers import dynamic_layers
from fdconv_deploy.checkpoints import convert_state_dict
from fdconv_deploy.config import (
    FCNHeadConfig,
    FDConvConfig,
    ResNetConfig,
    SegmentorConfig,
    UPerHeadConfig,
)
from fdconv_deploy.nn import Segmentor

TWINS = ("fdconv", "plain")
FILES = {"fdconv": "streets.pth", "plain": "streets_plain.pth"}


def architecture(name: str) -> SegmentorConfig:
    """A slim three-stage ResNet-50 under UPerHead; `name` is ``base``, ``plain`` or ``fdconv``."""
    base = 16
    widths = tuple(base * 4 * 2**stage for stage in range(3))
    return SegmentorConfig(
        backbone=ResNetConfig(
            depth=50,
            base_channels=base,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(0, 1, 2),
            conv=FDConvConfig(kernel_num=16) if name == "fdconv" else None,
        ),
        decode_head=UPerHeadConfig(
            in_channels=widths,
            in_index=(0, 1, 2),
            channels=32,
            num_classes=len(CLASSES),
        ),
        auxiliary_head=FCNHeadConfig(
            in_channels=widths[-1:],
            in_index=(2,),
            channels=32,
            num_classes=len(CLASSES),
            num_convs=1,
            concat_input=False,
        ),
        classes=CLASSES,
        palette=PALETTE,
    )


def continue_from(network: Segmentor, base: dict[str, Tensor]) -> None:
    """Start a network where the base ended; an FDConv network computes the same at first.

    Kernels become spectra by the published conversion. The published layer leaves one
    attention head, `filter_fc`, far from zero, which would spoil what the base has learnt:
    here it starts near zero as its sisters do.
    """
    layers = dynamic_layers(network)
    if not layers:
        network.load_state_dict(base)
        return
    conv = network.architecture.backbone.conv
    assert conv is not None
    converted = convert_state_dict(base, use_fdconv_if_c_gt=conv.use_fdconv_if_c_gt)
    missing, unexpected = network.load_state_dict(converted, strict=False)
    assert not unexpected, unexpected
    assert all(".KSM_" in key or ".FBM." in key for key in missing), missing
    for layer in layers.values():
        assert layer.KSM_Global.filter_fc is not None
        nn.init.normal_(layer.KSM_Global.filter_fc.weight, std=1e-6)
