"""Global and local attention folded into matrices, against the layer's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.folding.modulation import fold_local, fold_modulation
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.nn import FDConv2d
from tests.reference.lively import enliven, lively_input


def averages(layer: FDConv2d, seed: int) -> torch.Tensor:
    return lively_input((3, layer.in_channels, 1, 1), seed).flatten(1)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 3, (1, 3), 2]),
    st.sampled_from(["sigmoid", "tanh", "softmax"]),
    st.booleans(),
    st.floats(0.5, 3),
    st.sampled_from([None, 0.7, 2.0]),
    st.floats(0.5, 3),
    st.sampled_from([1, 2]),
    st.integers(0, 99),
)
@torch.no_grad()
def test_product_of_attentions(kernel, act, only, att_multi, temp, kernel_temp, ratio, seed):
    """Each attention is the layer's but for constant factors; their product is the gain."""
    layer = FDConv2d(
        18, 20, kernel, use_fdconv_if_k_in=[1, 2, 3], ksm_global_act=act,
        ksm_only_kernel_att=only or act == "softmax", att_multi=att_multi, temp=temp,
        kernel_temp=kernel_temp, param_ratio=ratio, use_fbm_if_k_in=[],
    )  # fmt: skip
    enliven(layer, seed)
    average = averages(layer, seed)
    folded = fold_modulation(layer.KSM_Global)
    assert folded.varies
    ours = FoldedConv2d(fold_layer(layer, (8, 8))).attention(average)
    theirs = layer.double().KSM_Global(average.double())
    total = 1.0
    for name in ("kernel", "filter", "spatial", "channel"):
        expected = getattr(theirs, name)
        if expected is None:
            assert ours[name].numel() == 0
            continue
        actual, expected = ours[name].double(), expected.flatten(1)
        factor = (actual * expected).sum() / actual.square().sum()
        torch.testing.assert_close(actual * factor, expected, rtol=0, atol=3e-6)
        assert expected.std(0).max() > 1e-3  # it does vary
        total *= float(factor)
    assert total == pytest.approx(folded.gain, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([18, 20, 64, 66]),
    st.sampled_from([1, 3, (1, 3), 2, 5]),
    st.sampled_from(["sigmoid", "tanh"]),
    st.floats(0.5, 3),
    st.integers(0, 99),
)
@torch.no_grad()
def test_local_attention(channels, kernel, act, att_multi, seed):
    layer = FDConv2d(
        channels, 17, kernel, use_fdconv_if_k_in=[1, 2, 3, 5], ksm_local_act=act,
        att_multi=att_multi, kernel_num=1, param_ratio=2, use_fbm_if_k_in=[],
    )  # fmt: skip
    enliven(layer, seed)
    local = fold_local(layer.KSM_Local)
    assert local.varies
    folded = FoldedConv2d(fold_layer(layer, (8, 8)))
    ours = folded.local_attention(averages(layer, seed)) * local.gain
    theirs = layer.double().KSM_Local(averages(layer, seed).double())
    matrix = theirs.permute(0, 1, 3, 2, 4).reshape(ours.shape)
    torch.testing.assert_close(ours.double(), matrix, rtol=0, atol=3e-6)


@torch.no_grad()
def test_constant_attention_is_told():
    layer = enliven(FDConv2d(18, 20, 3))
    heads = layer.KSM_Global
    for head in (heads.kernel_fc, heads.filter_fc, heads.spatial_fc, heads.channel_fc):
        assert fold_modulation(heads).varies
        head.weight.zero_()
    assert not fold_modulation(heads).varies
    layer.KSM_Local.norm.weight.zero_()
    assert not fold_local(layer.KSM_Local).varies
    enliven(layer).KSM_Local.conv.weight.zero_()
    assert not fold_local(layer.KSM_Local).varies
