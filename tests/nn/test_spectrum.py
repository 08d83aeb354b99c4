"""The bin order: a named, tested thing."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from fdconv_deploy.config import BandModulationConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn import spectrum
from fdconv_deploy.nn.band_modulation import masks_for
from fdconv_deploy.nn.spectrum import (
    bin_order,
    bin_radii,
    frequency_indices,
    group_map,
)


def order_sha256(order: torch.Tensor) -> str:
    return hashlib.sha256(order.numpy().tobytes()).hexdigest()


def test_orders_and_radii_are_the_published_ones(oracle):
    rows = json.loads((oracle / "layers/index_order.json").read_text())["rows"]
    assert len(rows) >= 20
    for row in rows:
        size = row["d1"], row["d2"]
        radii = bin_radii(*size).numpy()
        assert hashlib.sha256(radii.tobytes()).hexdigest() == row["dist_sha256"], row
        assert order_sha256(bin_order(*size)) == row["official_order_sha256_int64"], row
        assert order_sha256(bin_order(*size, "stable")) == row["stable_order_sha256_int64"], row


def test_a_torch_that_sorts_otherwise_is_refused(monkeypatch):
    """Silently, it would group a checkpoint's frequencies wrongly."""
    bin_order.cache_clear()
    spectrum._check_sort.cache_clear()
    stable_sort = torch.sort
    with monkeypatch.context() as patched:
        patched.setattr(torch, "sort", lambda x, stable=False: stable_sort(x, stable=True))
        with pytest.raises(UnsupportedLayerError, match="sorts equal radii in another order"):
            bin_order(48, 32)
        assert len(bin_order(48, 32, "stable")) == 816
    assert len(bin_order(48, 32)) == 816


def test_band_masks_are_the_published_ones(oracle):
    masks = load_file(oracle / "layers/fbm_masks_k2_4_8.safetensors")
    assert len(masks) >= 20
    for size, expected in masks.items():
        height, width = map(int, size.split("x"))
        assert torch.equal(masks_for(BandModulationConfig(), height, width), expected.float()), size


def test_group_map_names_each_bin_once():
    indices = frequency_indices(48, 32, 4)
    groups = group_map(indices, 48, 32)
    assert groups.shape == (1, 48, 17)
    assert groups.unique(return_counts=True)[1].tolist() == [204] * 4


def test_reduced_spectrum_drops_the_highest_bins():
    indices = frequency_indices(48, 32, 4, reduction=0.5)
    groups = group_map(indices, 48, 32)[0]
    radii = bin_radii(48, 32)
    assert int((groups >= 0).sum()) == 408
    assert radii[groups >= 0].max() <= radii[groups < 0].min()


@pytest.mark.parametrize("method", ["torch", "stable"])
def test_order_sorts(method):
    radii = bin_radii(30, 14).reshape(-1)[bin_order(30, 14, method)]
    assert bool((radii.diff() >= 0).all())
