"""Counts of operations against counts by hand, by PyTorch, and of the published network."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Operations, count_operations
from benchmarks.rivals import METHODS, install
from fdconv_deploy.config import FDConvConfig, ResNetConfig
from fdconv_deploy.nn import ResNet


def test_by_hand():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
            self.linear = nn.Linear(5, 2)

        def forward(self, x):
            y = self.conv(x)
            y = y * y + 1
            y = torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=y.shape[-2:])
            return self.linear(y.mean((2, 3)))

    counts = count_operations(Small(), (2, 3, 4, 8))
    feature = 2 * 5 * 4 * 8
    assert counts == Operations(
        convolution=feature * 3 * 9,
        matrix=2 * 5 * 2,
        # a square, a sum, a complex product over half the spectrum
        elementwise=feature + feature + 2 * (2 * 5 * 4 * 5),
        reduction=feature,
        transform=2 * (feature * 5 * 5 // 2),  # log₂(4 · 8) = 5, both ways
    )


@pytest.mark.parametrize("size", ["800x1280", "512x512", "512x1024"])
def test_the_published_network(oracle, size):
    expected = json.loads((oracle / "backbone" / "flops.json").read_text())[size]
    shape = (1, 3, *(int(side) for side in size.split("x")))
    with torch.device("meta"):
        networks = [
            ResNet(ResNetConfig(depth=50, conv=conv)).eval()
            for conv in (FDConvConfig(kernel_num=64), None)
        ]
    dynamic, plain = (count_operations(network, shape) for network in networks)
    extra = dynamic - plain
    assert plain.multiply_adds == round(expected["plain_conv_GMACs"] * 1e9)
    assert extra.multiply_adds == round(expected["conv_GMACs_delta"] * 1e9)
    known = expected["extra_GFLOPs_not_in_conv_counts"]
    if size == "800x1280":  # the paper's +1.8 G
        assert extra.multiply_adds + extra.elementwise == pytest.approx(1.8e9, abs=0.05e9)
    assert extra.transform == pytest.approx(
        (known["weight_irfft2"] + known["fbm_fft"]) * 1e9, rel=1e-6
    )


@pytest.mark.parametrize("method", METHODS)
def test_multiply_adds_are_pytorchs_own(method):
    torch.manual_seed(0)
    network = install(ResNet(ResNetConfig(depth=50, conv=None, base_channels=16)), method).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, 64, 64))
    counts = count_operations(network, (1, 3, 64, 64))
    assert 2 * counts.multiply_adds == counter.get_total_flops()


def test_a_network_with_weights_is_left_where_it_is():
    network = nn.Conv2d(3, 4, 1)
    count_operations(network, (1, 3, 8, 8))
    assert network.weight.device.type == "cpu"
