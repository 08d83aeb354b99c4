"""Layers and networks whose every branch is alive, as after training, without training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.nn.backbones.resnet import Block


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def enliven(layer: Any, seed: int = 0) -> Any:
    """Draw weights that leave no attention constant and no spectrum symmetric; eval mode.

    Args:
        layer: an FDConv2d, FDTokenConv or FDLinear.
        seed: of the weights.
    """
    generator = seeded(seed)

    def normal(tensor: Tensor, deviation: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation + mean)

    for name, parameter in layer.named_parameters():
        fan_in = math.prod(parameter.shape[1:])
        if name == "dft_weight":
            normal(parameter, float(parameter.std()))
        elif name.endswith("fc.weight"):
            normal(parameter, 0.7 / math.sqrt(fan_in))
        elif name.endswith("weight") and parameter.ndim > 1 and "Local" not in name:
            normal(parameter, 1.5 / math.sqrt(fan_in))
        elif name == "KSM_Local.conv.weight":
            normal(parameter, 0.6)
        elif name.endswith(("weight", "scale")):
            normal(parameter, 0.2, mean=1.0)
        else:
            normal(parameter, 0.3)
    norm = getattr(getattr(layer, "KSM_Global", None), "bn", None)
    if isinstance(norm, nn.BatchNorm2d):
        normal(norm.running_mean, 0.3)
        normal(norm.running_var, 0.1, mean=0.5)
    return layer.eval()


def lively_input(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Images whose averages differ, so that their kernels do: ``(B, C, H, W)`` float32."""
    generator = seeded(seed)
    offsets = torch.randn(*shape[:2], 1, 1, generator=generator)
    return torch.randn(shape, generator=generator) + offsets


@torch.no_grad()
def enliven_network(
    network: nn.Module, seed: int = 0, images: Sequence[Tensor] | None = None
) -> nn.Module:
    """Enliven every FDConv layer, then measure each BatchNorm's statistics; eval mode.

    Args:
        images: batches to measure on, as what the network will see; `lively_input` if not given.

    As in a trained network, no image drives an attention to its end and a block adds less
    than it passes on. Otherwise depth amplifies any difference, a rounding error's too, until
    two float32 networks of the same weights have nothing in common.
    """
    generator = seeded(seed)
    modules = dict(network.named_modules())
    layers = [m for m in modules.values() if isinstance(m, FDConv2d) and m.is_dynamic]
    for index, layer in enumerate(layers):
        spectrum = layer.dft_weight.detach().clone() if layer.convert_param else None
        enliven(layer, seed + index)
        if spectrum is not None:
            layer.dft_weight.copy_(spectrum)
        for name, parameter in layer.named_parameters():
            if name.endswith("_fc.weight"):
                parameter *= 0.3
    norms = [m for m in modules.values() if isinstance(m, nn.BatchNorm2d)]
    inner = {id(layer.KSM_Global.bn) for layer in layers}  # a BatchNorm, or not among them
    last = {id(m.get_submodule(f"bn{m.depth}")) for m in modules.values() if isinstance(m, Block)}
    for norm in norms:
        norm.reset_running_stats()
        gain = 0.4 if id(norm) in inner else 0.15 if id(norm) in last else 1.0
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * gain + gain / 2)
        if id(norm) not in inner:
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.2)
    if images is None:
        images = [lively_input((8, 3, 96, 96), seed * 10 + step) for step in range(3)]
    network.train()
    for step, batch in enumerate(images):
        for norm in norms:
            norm.momentum = 1 / (step + 1)  # the mean over the batches seen
        network(batch)
    return network.eval()


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    difference = float((actual.double() - expected.double()).abs().max())
    # Where a stride sees nothing but padding, all is zero and stays so.
    return difference / (float(expected.double().abs().max()) or 1)
