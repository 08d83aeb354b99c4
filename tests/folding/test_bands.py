"""Band modulation by constant matrices, against the layer's FFTs, at any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.config import BandModulationConfig
from fdconv_deploy.folding.bands import fold_bands
from fdconv_deploy.folding.module import FoldedBandModulation
from fdconv_deploy.nn.band_modulation import BandModulation, masks_for
from tests.reference.lively import error, lively_input, seeded

SIDES = st.integers(1, 70)
SIZES = [(1, 1), (2, 3), (1, 9), (9, 1), (65, 97), (128, 256), (200, 336), (512, 512), (7, 130)]


@torch.no_grad()
def modulation(channels: int, seed: int = 0, **config) -> BandModulation:
    fbm = BandModulation(channels, BandModulationConfig(**config)).eval()
    generator = seeded(seed)
    for parameter in fbm.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return fbm


@torch.no_grad()
def error_at(fbm: BandModulation, channels: int, size: tuple[int, int], batch: int = 2) -> float:
    x = lively_input((batch, channels, *size), 3)
    folded = FoldedBandModulation(fold_bands(fbm, *size))(x)
    y = fbm.double()(x.double())
    fbm.float()
    return error(folded, y)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    assert error_at(modulation(3), 3, size) <= 1e-6


@settings(deadline=None, max_examples=60)
@given(
    SIDES,
    SIDES,
    st.lists(st.sampled_from([1, 1.5, 2, 3, 4, 8, 16, 100]), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["sigmoid", "tanh", "softmax"]),
    st.sampled_from([1, 2, 65]),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([(64, 64), (32, 16), (33, 47)]),
)
def test_any_config(height, width, k_list, lowfreq, act, groups, kernel, max_size):
    """Bands in any order, repeated ones and empty ones included."""
    fbm = modulation(
        4, k_list=tuple(k_list), lowfreq_att=lowfreq, act=act, spatial_group=groups,
        spatial_kernel=kernel, max_size=max_size,
    )  # fmt: skip
    assert error_at(fbm, 4, (height, width)) <= 2e-6


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (30, 40), (128, 256), (2, 3)])
@torch.no_grad()
def test_each_low_pass(size):
    """Errors of a band would hide where the maps of two bands happen to be alike."""
    fbm = modulation(2)
    x = lively_input((1, 2, *size)).double()
    lows = FoldedBandModulation(fold_bands(fbm, *size)).double().low_passes(x)
    masks = masks_for(fbm.config, *size).double()
    for low, mask in zip(lows, masks, strict=True):
        expected = torch.fft.irfft2(torch.fft.rfft2(x) * mask, s=size)
        assert error(low, expected) <= 5e-7


def test_both_kinds_of_row_mask_were_met():
    """Symmetric ones take half the numbers; resizing leaves most sizes with others."""
    kinds = {size: fold_bands(modulation(2), *size).complex_rows for size in SIZES}
    assert kinds[2, 3] is kinds[1, 9] is False
    assert kinds[65, 97] is kinds[128, 256] is kinds[200, 336] is kinds[512, 512] is True
    folded = fold_bands(modulation(2), 64, 64)
    assert folded.to_rows.shape == (31, 64)
    assert folded.to_columns.shape == (64, 32)
