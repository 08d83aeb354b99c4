"""How many kernels a network launches: counted, so that no change adds any unnoticed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install triton)", allow_module_level=True)

from benchmarks.gpu.launches import count_launches, launches


def test_views_and_memory_are_no_kernels():
    class Network(nn.Module):
        def forward(self, x):
            y = torch.empty_like(x).view(-1)
            return (x.view(2, -1)[:1].expand(3, -1) + 1).t(), y

    x = torch.zeros(2, 3, 4, 4)
    assert count_launches(Network(), x) == {"add": 1}


def test_a_convolution_and_its_bias_are_two_kernels():
    found = launches(nn.Conv2d(4, 6, 3, padding=1), torch.zeros(1, 4, 8, 8))
    assert [one.operator for one in found] == ["bias", "convolution"]
    assert found[1].product == (1, 8 * 8, 6, 4 * 9)
    assert found[1].written == 4 * 6 * 8 * 8


def test_a_product_counts_its_matrices():
    x = torch.zeros(3, 5, 4)
    (one,) = launches(nn.Linear(4, 7, bias=False), x)
    assert one.product == (1, 15, 7, 4)
    assert one.written == 4 * 15 * 7
