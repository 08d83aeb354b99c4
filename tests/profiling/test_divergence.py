"""Divergence of two bundles, layer by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fdconv_deploy.errors import BundleError
from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.profiling.divergence import compare_bundles
from fdconv_deploy.runtime.bundle import Bundle
from tests.reference.lively import enliven


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.wide = enliven(FDConv2d(32, 32, 3, padding=1, kernel_num=16))
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).relu()
        return self.head(self.wide(y).relu() + y)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return Chain().eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exact(network, images, tmp_path_factory) -> Bundle:
    return export_module(network, images, tmp_path_factory.mktemp("exact") / "b")


def test_a_bundle_does_not_diverge_from_itself(exact, images) -> None:
    found = compare_bundles(exact, exact, 1, {"input": images.numpy()})
    assert [one.name for one in found] == ["stem", "wide", "wide (sum)", "head"]
    assert all(one.max_rel == 0 for one in found)
    assert all(one.angle == pytest.approx(0, abs=1e-9) for one in found)


def test_half_precision_diverges_a_little_everywhere(exact, network, images, tmp_path) -> None:
    half = export_module(network, images, tmp_path / "b", precision="fp16")
    found = compare_bundles(exact, half, 1, {"input": images.numpy()})
    assert {"stem", "wide", "head"} <= {one.name for one in found}
    assert all(1e-6 < one.max_rel < 1e-2 for one in found)
    assert all(one.angle < 1e-4 for one in found)


def test_a_changed_layer_is_where_it_begins(exact, network, images, tmp_path) -> None:
    changed = Chain().eval()
    changed.load_state_dict(network.state_dict())
    with torch.no_grad():
        changed.wide.dft_weight.mul_(1.1)
    other = export_module(changed, images, tmp_path / "b")
    found = {one.name: one for one in compare_bundles(exact, other, 1, {"input": images.numpy()})}
    assert found["stem"].max_rel == 0
    assert found["wide"].max_rel == pytest.approx(0.1, rel=0.2)
    assert found["head"].max_rel > 0.001


def test_what_cannot_be_compared(exact, images, tmp_path) -> None:
    feeds = {"input": images.numpy()}
    other_size = export_module(Chain().eval(), torch.randn(1, 3, 16, 16), tmp_path / "size")
    with pytest.raises(BundleError, match=r"size takes input \(1, 3, 16, 16\) float32, b input"):
        compare_bundles(exact, other_size, 1, feeds)
    stranger = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    another = export_module(stranger, images, tmp_path / "another")
    with pytest.raises(BundleError, match="no layer's name in common"):
        compare_bundles(exact, another, 1, feeds)
    assert Path(exact.path).is_dir()
    assert np.isfinite(images.numpy()).all()
