"""How many kernels a network launches: counted, so that no change adds any unnoticed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install triton)", allow_module_level=True)

from benchmarks.gpu.launches import count_launches, launches, without_gpu
from fdconv_deploy.nn import FDConv2d


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


def test_bands_run_beside_their_layers_attentions_and_assembly():
    from fdconv_deploy.folding.cuda import fuse_network

    network = nn.Sequential(nn.Conv2d(3, 24, 1), FDConv2d(24, 24, 3, padding=1, kernel_num=4))
    x = torch.zeros(1, 3, 12, 12)
    with without_gpu():
        fused = fuse_network(network.eval(), x, dtype=torch.float16, channels_last=True)
    found = [(one.operator, one.beside) for one in launches(fused, x)]
    kernels = ["project_rows_kernel", "filter_columns_kernel", "modulate_rows_kernel"]
    beside = [(name, True) for name in kernels]  # they make the maps, too
    assert [one for one in found if one[1]] == beside
    last = found.index(beside[-1])
    after = ["attend_rows_kernel", "column_kernel", "convolution", "finish_kernel"]
    assert found[last + 1 :] == [(name, False) for name in after]


def test_what_a_network_makes_as_it_runs_is_made_where_it_runs():
    class Network(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)

    from fdconv_deploy.folding.cuda.trace import trace_fused

    meta = torch.device("meta")
    x = torch.zeros(1, 2, 3, 4)
    traced = trace_fused(Network().eval(), x, {}, torch.float16, False, meta)
    answer = traced(x.to(meta, torch.float16))
    assert (answer.device, answer.dtype, answer.shape) == (meta, torch.float16, x.shape)
