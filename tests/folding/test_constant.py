"""Layers whose attention cannot vary become plain convolutions."""

from __future__ import annotations

import pytest
import torch

from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.nn import FDConv2d
from tests.reference.lively import enliven, error, lively_input

VARIANTS = [
    {},
    dict(kernel_size=3),
    dict(kernel_size=3, stride=2, dilation=2, bias=False),
    dict(param_ratio=2, ksm_global_act="tanh", ksm_local_act="tanh"),
    dict(param_reduction=0.5),
    dict(convert_param=False),
    dict(ksm_only_kernel_att=True, ksm_global_act="softmax"),
    dict(use_ksm_local=False, kernel_size=(1, 3)),
    dict(use_fbm_if_k_in=[1], fbm_cfg={"lowfreq_att": True}),
]


@torch.no_grad()
def still(layer: FDConv2d, how: str) -> FDConv2d:
    """Stop the layer's attentions, leaving their biases, in one of the ways there are."""
    enliven(layer)
    heads = layer.KSM_Global
    if how == "star":
        heads.relu.scale.zero_()
    else:
        for head in (heads.kernel_fc, heads.filter_fc, heads.spatial_fc, heads.channel_fc):
            if head is not None:
                head.weight.zero_()
    if layer.KSM_Local is not None:
        stopped = layer.KSM_Local.norm if how == "star" else layer.KSM_Local.conv
        stopped.weight.zero_()
    return layer


@pytest.mark.parametrize("how", ["heads", "star"])
@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
@torch.no_grad()
def test_equals_the_layer(arguments, how):
    layer = still(
        FDConv2d(**(dict(in_channels=20, out_channels=24, kernel_size=1) | arguments)), how
    )
    folded = fold_layer(layer, (9, 14))
    assert folded.spectrum is None
    assert folded.constant_weight.shape == (24, 20, *layer.kernel_size)
    x = lively_input((2, 20, 9, 14))
    assert error(FoldedConv2d(folded)(x), layer.double()(x.double())) <= 2e-6


@pytest.mark.parametrize(
    "alive", ["kernel_fc", "filter_fc", "spatial_fc", "channel_fc", "KSM_Local.conv"]
)
@torch.no_grad()
def test_one_live_attention_is_enough_to_stay_dynamic(alive):
    layer = still(FDConv2d(20, 24, 3, padding=1), "heads")
    owner = layer if "." in alive else layer.KSM_Global
    owner.get_submodule(alive).weight.normal_(0, 0.3)
    folded = fold_layer(layer, (9, 14))
    assert folded.constant_weight is None
    x = lively_input((2, 20, 9, 14))
    assert error(FoldedConv2d(folded)(x), layer.double()(x.double())) <= 2e-6
