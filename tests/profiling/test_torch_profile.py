"""The clock around a PyTorch network's layers."""

from __future__ import annotations

import torch
from torch import nn

from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.profiling.torch_profile import BEFORE, profile_network


class Slow(nn.Module):
    """Takes seconds of a clock that nothing else turns."""

    now = 0.0

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Slow.now += self.seconds
        return x


class SlowAttention(FDConv2d):
    def attention(self, *inputs):
        return super().attention(*map(Slow(5), inputs))


def profiled(network: nn.Module, x: torch.Tensor) -> dict[str, dict[str, float]]:
    layers = profile_network(network.eval(), (x,), runs=3, clock=lambda: Slow.now)
    return {layer.name: layer.milliseconds for layer in layers}


def test_time_goes_to_the_layer_and_part_that_runs() -> None:
    torch.manual_seed(0)
    dynamic = SlowAttention(32, 32, 3, padding=1, kernel_num=16)
    original = dynamic.FBM.forward
    dynamic.FBM.forward = lambda x: Slow(20)(original(x))
    network = nn.Sequential(
        Slow(30), nn.Conv2d(3, 32, 3), Slow(10), dynamic, nn.Conv2d(32, 8, 1), Slow(40)
    )
    layers = profiled(network, torch.randn(1, 3, 20, 20))
    assert list(layers) == [BEFORE, "1", "3", "4"]
    spent = {name: {k: v / 1e3 for k, v in parts.items() if v} for name, parts in layers.items()}
    assert spent == {
        BEFORE: {"rest": 30},
        "1": {"rest": 10},
        "3": {"attention": 5, "band modulation": 20},
        "4": {"rest": 40},
    }
    assert set(layers["3"]) == {
        "attention", "band modulation", "kernel assembly", "convolutions", "rest"
    }  # fmt: skip


def test_the_parts_are_the_whole() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), Slow(7), FDConv2d(32, 32, 3, padding=1, kernel_num=16), Slow(50)
    )
    layers = profiled(network, torch.randn(1, 3, 16, 16))
    assert sum(sum(parts.values()) for parts in layers.values()) == 57e3


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
