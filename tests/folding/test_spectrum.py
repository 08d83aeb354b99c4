"""Spectra laid out for the inverse transform: every bin keeps its value and its attention."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.folding.spectrum import fold_spectrum, straddling_rows
from fdconv_deploy.nn import FDConv2d
from tests.reference import bin_order
from tests.reference.lively import enliven, error, lively_input, seeded
from tests.reference.operators import frequency_assembly


def assembled(spectra: np.ndarray, groups: np.ndarray, attention: np.ndarray, columns: int):
    """What the spectra mean, by numpy's own inverse transform."""
    weights = np.where(groups >= 0, attention[:, groups], 0)
    total = (spectra * weights).sum(1)
    return np.fft.irfft2(total, s=(spectra.shape[1], columns))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([2, 5, 200]),
    st.sampled_from(["random", "mirrored", "dropped"]),
    st.integers(0, 99),
)
def test_any_grouping(ratio, rows, columns, count, kind, seed):
    """Mirrored bins in one group, in two, or missing; odd and even sizes; no symmetry at all."""
    rng = np.random.default_rng(seed)
    shape = ratio, rows, columns // 2 + 1
    spectra = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    groups = rng.integers(0, count, shape)
    if kind == "mirrored":
        q = np.arange(rows)
        groups = groups[:, np.minimum(q, (rows - q) % rows)]
    if kind == "dropped":
        groups[rng.random(shape) < 0.4] = -1
        spectra[groups < 0] = 0
        groups[0, 0, 0] = 0
    attention = rng.random((3, count))
    folded = fold_spectrum(spectra, groups, columns)
    # Dropped bins hold zeros, so that any attention may weigh them.
    expected = assembled(spectra, groups, attention, columns)
    actual = frequency_assembly(attention, folded)
    assert np.abs(actual - expected).max() <= 3e-7 * np.abs(expected).max()
    apart = straddling_rows(groups, columns)
    assert kind != "mirrored" or apart == ()
    # A symmetric grouping costs no second slots.
    slots = folded.row_transform.slots
    assert (slots >= 0).sum() == rows // 2 + 1 + len(apart)


def test_which_rows_straddle():
    groups = np.zeros((1, 8, 5), dtype=np.int64)
    assert straddling_rows(groups, 8) == ()
    groups[0, 1, 2] = 3  # an inner column stores no mirror image
    assert straddling_rows(groups, 8) == ()
    groups[0, 2, 0] = 1  # its image is in row 6
    groups[0, 5, 4] = 1  # Nyquist: its image is in row 3
    assert straddling_rows(groups, 8) == (2, 3)
    assert straddling_rows(groups, 9) == (2,)  # an odd width has no Nyquist column


@torch.no_grad()
def folded_error(layer: FDConv2d, size: tuple[int, int] = (9, 8)) -> float:
    x = lively_input((2, layer.in_channels, *size))
    folded = FoldedConv2d(fold_layer(layer, size))(x)
    y = layer.double()(x.double())
    layer.float()
    return error(folded, y)


@pytest.mark.parametrize(
    ("arguments", "apart"),
    [
        (dict(in_channels=64, out_channels=64, kernel_size=1, kernel_num=64), True),
        (dict(in_channels=32, out_channels=48, kernel_size=3, kernel_num=4), False),
    ],
)
def test_layers_as_published(arguments, apart):
    """Whether the published sort tears mirror images apart is known of these two."""
    layer = enliven(FDConv2d(**arguments))
    slots = fold_layer(layer, (9, 8)).spectrum.row_transform.slots
    frequencies = arguments["out_channels"] * arguments["kernel_size"] // 2 + 1
    assert bool((slots >= 0).sum() > frequencies) == apart
    assert folded_error(layer) <= 2e-6


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("param_ratio", [1, 2])
@pytest.mark.parametrize("param_reduction", [1.0, 0.5])
def test_orders_that_tear_mirror_images_apart(kernel_size, param_ratio, param_reduction):
    """Each plane in a random order of its own: nearly every row straddles, Nyquist's too."""
    rows, half = 20 * kernel_size, 20 * kernel_size // 2 + 1
    generator = seeded(5)
    kept = int(rows * half * param_reduction)
    flat = [torch.randperm(rows * half, generator=generator)[:kept] for _ in range(param_ratio)]
    order = torch.stack([torch.stack([f // half, f % half]) for f in flat])
    layer = FDConv2d(
        20, 20, kernel_size, padding=1, kernel_num=5, param_ratio=param_ratio,
        param_reduction=param_reduction,
        frequency_order=order.reshape(param_ratio, 2, 5, -1),
    )  # fmt: skip
    enliven(layer)
    spectrum = fold_layer(layer, (9, 8)).spectrum
    named = spectrum.row_transform.slots
    assert (named >= 0).sum() >= 1.6 * (rows // 2)
    assert folded_error(layer) <= 2e-6


@pytest.mark.parametrize("param_ratio", [1, 2])
def test_group_map_hash_is_of_the_checkpoints_grouping(param_ratio):
    """Little-endian int16, plane by plane, row by row, groups of each plane counted on."""
    layer = FDConv2d(20, 24, 3, kernel_num=4, param_ratio=param_ratio)
    order = bin_order(72, 60)
    groups = np.zeros((param_ratio, 72 * 31), dtype="<i2")
    for plane in range(param_ratio):
        groups[plane, order] = np.repeat(np.arange(4), 72 * 31 // 4) + 4 * plane
    enliven(layer)
    digest = hashlib.sha256(groups.tobytes()).hexdigest()
    assert fold_layer(layer, (5, 5)).spectrum.group_map_sha256 == digest


@pytest.mark.parametrize("param_ratio", [1, 2])
def test_more_attentions_than_a_byte_counts(param_ratio):
    arguments: dict[str, Any] = dict(kernel_num=272 // param_ratio, param_ratio=param_ratio)
    layer = enliven(FDConv2d(32, 32, 1, **arguments))
    assert fold_layer(layer, (4, 4)).spectrum.groups.dtype == np.int32
    assert folded_error(layer) <= 2e-6
    few = enliven(FDConv2d(32, 32, 1, kernel_num=136))
    assert fold_layer(few, (4, 4)).spectrum.groups.dtype == np.uint8
    assert folded_error(few) <= 2e-6
