"""A BatchNorm folded into the layer before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.folding.modulation import fold_batch_norm
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.nn import FDConv2d
from tests.reference.lively import enliven, error, lively_input
from tests.reference.networks import batch_norm


@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_inference_form(affine):
    norm = batch_norm(7, affine=affine)
    x = lively_input((3, 7, 4, 5))
    scale, shift = fold_batch_norm(norm)
    folded = x.double().numpy() * scale[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(folded, norm.double()(x.double()), rtol=1e-13, atol=1e-13)


@settings(deadline=None, max_examples=24)
@given(
    st.sampled_from([(1, 4, 5), (1, 24, 31), (3, 6, 6), (3, 24, 24)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.integers(0, 99),
)
@torch.no_grad()
def test_layer_and_norm_as_one(shape, bias, only_kernel, stride, seed):
    """Filter attention on the kernel and on the output, or none at all."""
    kernel, height, width = shape
    layer = FDConv2d(
        20, 20, kernel, stride, kernel // 2, bias=bias, ksm_only_kernel_att=only_kernel
    )
    enliven(layer, seed)
    norm = batch_norm(20, seed=seed)
    scale, shift = fold_batch_norm(norm)
    folded = fold_layer(layer, (height, width), scale=scale, shift=shift)
    x = lively_input((2, 20, height, width), seed)
    expected = norm.double()(layer.double()(x.double()))
    assert error(FoldedConv2d(folded)(x), expected) <= 2e-6


@torch.no_grad()
def test_both_sides_of_the_filter_were_met():
    """The sizes above make both choices, or they would prove less than they say."""
    layer = enliven(FDConv2d(20, 20, 3, 2, 1))
    sides = {fold_layer(layer, size).filter_side for size in ((6, 6), (24, 24))}
    assert sides == {"kernel", "feature"}
