"""The reference against the published code's tensors, and the network against it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fdconv_deploy.config import BandModulationConfig
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.nn.band_modulation import masks_for
from fdconv_deploy.nn.spectrum import bin_order as torch_order
from tests.reference import ReferenceFDConv, bin_order, bin_radii, introsort_order
from tests.reference.arguments import layer_arguments
from tests.reference.lively import enliven, lively_input
from tests.reference.spectrum import band_mask


def reference_of(layer: FDConv2d, arguments: dict, order: np.ndarray | None = None):
    state = {k: v.detach().double().numpy() for k, v in layer.state_dict().items()}
    return ReferenceFDConv(state, arguments, order)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.size == expected.size
    difference = np.abs(actual.reshape(expected.shape) - expected).max()
    return difference / (np.abs(expected).max() or 1)


def test_every_published_fixture(oracle: Path):
    """Outputs within 2e-6, the published code's own float32 rounding."""
    cases = json.loads((oracle / "layers/index.json").read_text())["cases"]
    errors = {}
    for case in cases:
        tensors = load_file(oracle / "layers" / case["file"])
        state = {k.removeprefix("state."): v for k, v in tensors.items() if "state." in k}
        layer = ReferenceFDConv(state, case["ctor"])
        assert layer.dynamic == case["dynamic"], case["file"]
        errors[case["file"]] = relative(layer(tensors["x"]), tensors["y"])
        if "mid.adaptive_weight_2d" in tensors:
            attention = tensors["mid.kernel_attention"].reshape(len(tensors["x"]), -1)
            matrices = np.stack([layer.kernel_matrix(a) for a in attention.astype(np.float64)])
            errors[f"{case['file']} matrix"] = relative(matrices, tensors["mid.adaptive_weight_2d"])
    assert len(errors) > 80
    assert {name: error for name, error in errors.items() if error > 2e-6} == {}


def test_published_orders_and_masks(oracle: Path):
    rows = json.loads((oracle / "layers/index_order.json").read_text())["rows"]
    for row in (row for row in rows if row["n_bins"] < 300_000):
        size = row["d1"], row["d2"]
        assert hashlib.sha256(bin_radii(*size).tobytes()).hexdigest() == row["dist_sha256"]
        digest = hashlib.sha256(bin_order(*size).astype("<i8").tobytes()).hexdigest()
        assert digest == row["official_order_sha256_int64"], size
    for name, expected in load_file(oracle / "layers/fbm_masks_k2_4_8.safetensors").items():
        height, width = map(int, name.split("x"))
        masks = [band_mask(k, height, width, (64, 64)) for k in (2, 4, 8)]
        assert np.array_equal(masks, expected.astype(bool)), name


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 12), max_size=900), st.booleans())
def test_sort_leaves_ties_as_torch_does(keys, ordered):
    keys = np.array(sorted(keys) if ordered else keys, dtype=np.float32)
    assert introsort_order(keys).tolist() == torch.sort(torch.from_numpy(keys)).indices.tolist()


def test_sort_of_keys_that_defeat_the_median_of_three():
    """Musser's sequence makes every partition lopsided, so heap sort takes over."""
    half = 2000
    killer = np.empty(2 * half, dtype=np.float32)
    killer[:half:2], killer[1:half:2] = np.arange(1, half, 2), np.arange(half + 1, 2 * half, 2)
    killer[half:] = np.arange(2, 2 * half + 1, 2)
    for keys in (killer, np.floor(killer / 8)):  # without and with ties
        assert introsort_order(keys).tolist() == torch.sort(torch.from_numpy(keys)).indices.tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(1, 90).map(lambda n: 2 * n))
def test_order_of_any_matrix(rows, columns):
    assert np.array_equal(bin_order(rows, columns), torch_order(rows, columns).numpy())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([(64, 64), (32, 32), (31, 48)]),
    st.sampled_from([1, 2, 3, 4, 8, 100]),
)
def test_masks_at_any_size(height, width, made_at, k):
    config = BandModulationConfig(k_list=(k,), max_size=made_at)
    ours = masks_for(config, height, width)[0].numpy()
    assert np.array_equal(ours > 0, band_mask(k, height, width, made_at))


@settings(deadline=None, max_examples=60)
@given(layer_arguments())
@torch.no_grad()
def test_any_layer(case):
    arguments, size, seed = case
    layer = enliven(FDConv2d(**arguments), seed)
    x = lively_input((2, arguments["in_channels"], *size), seed)
    y = layer.double()(x.double()).numpy()
    # Without converted spectra the published layer transforms its weight in float32.
    limit = 1e-11 if layer.convert_param else 2e-6
    assert relative(y, reference_of(layer, arguments)(x.numpy())) <= limit


@torch.no_grad()
def test_any_order_given():
    arguments = dict(in_channels=18, out_channels=20, kernel_size=3, padding=1, param_ratio=2)
    generator = torch.Generator().manual_seed(0)
    bins = 60 * 28
    flat = torch.stack([torch.randperm(bins, generator=generator) for _ in range(2)])
    given_order = torch.stack([flat // 28, flat % 28], 1).reshape(2, 2, 4, -1)
    layer = enliven(FDConv2d(**arguments, frequency_order=given_order))
    x = lively_input((2, 18, 9, 14))
    expected = reference_of(layer, arguments, flat.numpy())(x.numpy())
    assert relative(layer.double()(x.double()).numpy(), expected) <= 1e-11
