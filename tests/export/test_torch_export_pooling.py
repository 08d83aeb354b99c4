"""Adaptive pooling as two matrix products, against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fdconv_deploy.export.torch_export import FoldedAdaptivePool, pooling_matrix

SIDES = st.integers(1, 40)


@settings(deadline=None, max_examples=80)
@given(SIDES, SIDES, SIDES, SIDES)
def test_equals_adaptive_pooling(height, width, rows, columns):
    """More bins than pixels included."""
    pool = nn.AdaptiveAvgPool2d((rows, columns))
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(FoldedAdaptivePool(pool)(x), pool(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [3, (None, 4), (5, None)])
def test_sizes_torch_takes(size):
    pool = nn.AdaptiveAvgPool2d(size)
    x = torch.randn(1, 2, 9, 7, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(FoldedAdaptivePool(pool)(x), pool(x), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES)
def test_rows_are_averages(length, bins):
    matrix = pooling_matrix(length, bins)
    assert matrix.shape == (bins, length)
    assert abs(matrix.sum(1) - 1).max() < 1e-12
    assert (matrix >= 0).all()
