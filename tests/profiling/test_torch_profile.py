"""The clock around a PyTorch network's layers."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.profiling.torch_profile import BEFORE, profile_network


class Slow(nn.Module):
    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.milliseconds / 1e3)
        return x


def test_whose_time_it_is() -> None:
    torch.manual_seed(0)
    dynamic = FDConv2d(32, 32, 3, padding=1, kernel_num=16)
    original = dynamic.FBM.forward
    dynamic.FBM.forward = lambda x: Slow(20)(original(x))
    network = nn.Sequential(
        Slow(30), nn.Conv2d(3, 32, 3), Slow(10), dynamic, nn.Conv2d(32, 8, 1), Slow(20)
    ).eval()
    x = torch.randn(1, 3, 20, 20)
    layers = {one.name: one.milliseconds for one in profile_network(network, (x,), runs=3)}
    assert list(layers) == [BEFORE, "1", "3", "4"]
    # A sleep is never shorter than asked for, and a busy machine makes it longer.
    assert 30 <= layers[BEFORE]["rest"] < 60
    assert 10 <= layers["1"]["rest"] < 40
    assert 20 <= layers["4"]["rest"] < 50
    assert layers["1"]["convolutions"] < 10
    assert set(layers["3"]) == {
        "attention", "band modulation", "kernel assembly", "convolutions", "rest"
    }  # fmt: skip
    assert 20 <= layers["3"]["band modulation"] < 50
    assert layers["3"]["rest"] < 10


def test_the_parts_are_the_whole() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), FDConv2d(32, 32, 3, padding=1, kernel_num=16), Slow(50)
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    layers = profile_network(network, (x,), runs=3)
    added = sum(sum(layer.milliseconds.values()) for layer in layers)
    with torch.inference_mode():
        network(x)
        start = time.perf_counter()
        network(x)
        whole = (time.perf_counter() - start) * 1e3
    assert added == pytest.approx(whole, rel=0.4)
    assert added > 50


def test_it_leaves_the_network_as_it_was() -> None:
    network = nn.Sequential(FDConv2d(32, 32, 3, padding=1, kernel_num=16)).eval()
    x = torch.randn(1, 32, 8, 8)
    before = dict(network[0].__dict__)
    with torch.inference_mode():
        expected = network(x)
        profile_network(network, (x,), runs=1)
        assert torch.equal(network(x), expected)
    assert set(network[0].__dict__) == set(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
