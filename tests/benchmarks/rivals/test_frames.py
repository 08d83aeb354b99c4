"""The rivals in a ResNet-50: which convolutions, how many parameters."""

from __future__ import annotations

import pytest
import torch

from benchmarks.rivals import METHODS, install
from benchmarks.rivals.frames import block_convs
from fdconv_deploy.config import FDConvConfig, ResNetConfig
from fdconv_deploy.nn import ResNet

PLAIN = 23_508_032


def resnet50(method: str | None = None, **fields: object) -> ResNet:
    network = ResNet(ResNetConfig(**({"depth": 50, "conv": None} | fields)))
    return network if method is None else install(network, method)


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_fdconv_adds_what_the_paper_says():
    with torch.device("meta"):
        network = ResNet(ResNetConfig(depth=50, conv=FDConvConfig(kernel_num=64)))
        assert parameters(resnet50()) == PLAIN
    assert parameters(network) - PLAIN == 3_647_120


# What the paper's table has beyond the backbone: DCD's 4.3 M hold its dynamic classifier.
BEYOND = {"dcd": 228_992}


@pytest.mark.parametrize(
    ("method", "added"),
    [
        ("condconv", 89_981_000),
        ("dyconv", 75_315_200),
        ("dcd", 4_049_032),
        ("odconv", 65_113_856),
        ("kw1", 2_495_278),
        ("kw4", 76_458_112),
    ],
)
def test_parameters_are_those_of_table_1(method, added):
    with torch.device("meta"):
        network = resnet50(method)
    assert parameters(network) - PLAIN == added
    assert round((added + BEYOND.get(method, 0)) / 1e6, 1) == METHODS[method].parameters


def dcd_classifier(features: int = 2048, classes: int = 1000, narrow: int = 32) -> int:
    """Parameters that DCD's classifier has beyond a plain one's, from its published layers."""
    branch = features * narrow + narrow**2  # squeeze and its gate
    maps = narrow * narrow**2 + narrow * classes  # Φ and Λ
    projections = features * narrow + narrow * classes  # Q and P
    return branch + maps + projections + 2 * 2 * narrow  # and two normalisations


def test_what_dcd_has_beyond_the_backbone():
    assert dcd_classifier() == BEYOND["dcd"]


@pytest.mark.parametrize(
    ("method", "replaced"),
    [("condconv", 9), ("dyconv", 52), ("dcd", 48), ("odconv", 48), ("kw1", 50), ("kw4", 50)],
)
def test_which_convolutions_are_replaced(method, replaced):
    with torch.device("meta"):
        network = resnet50(method)
    left = block_convs(network)
    assert len(left) == 52 - replaced
    if method in ("kw1", "kw4"):
        assert set(left) == {"layer1.0.conv1", "layer1.0.downsample.0"}
    elif method == "condconv":
        assert not [n for n in left if n.startswith("layer4") and "downsample" not in n]
    else:
        assert all("downsample" in name for name in left)
    assert type(network.conv1) is torch.nn.Conv2d


def test_a_warehouse_is_shared_by_a_stage_and_the_next_ones_entrance():
    network = resnet50("kw1", base_channels=8)
    cells = {n: m.cells for n, m in network.named_modules() if hasattr(m, "cells")}
    assert len({id(shared) for shared in cells.values()}) == 4
    assert cells["layer1.2.conv3"] is cells["layer2.0.conv1"] is cells["layer2.0.downsample.0"]
    assert cells["layer2.0.conv2"] is not cells["layer2.0.conv1"]


@pytest.mark.parametrize("method", METHODS)
def test_the_network_runs(method):
    torch.manual_seed(0)
    # Normalised by its own batch: untrained statistics let some of these grow without bound.
    network = resnet50(method, base_channels=16).train()
    with torch.no_grad():
        features = network(torch.randn(2, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [
        (2, 64 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)
    ]
    assert all(f.isfinite().all() for f in features)


def test_a_network_without_plain_convolutions_is_refused():
    with pytest.raises(ValueError, match="a ResNet with plain convolutions"):
        install(torch.nn.Linear(2, 2), "dcd")
