"""What FDConv layers ask of a training: rates of their own, and a faster spectrum."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fdconv_deploy.nn import FDConv2d


class Rates(Protocol):
    """What of a recipe `parameter_groups` needs."""

    @property
    def attention_factor(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...


def dynamic_layers(network: nn.Module) -> dict[str, FDConv2d]:
    """The dynamic FDConv layers by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, FDConv2d) and module.is_dynamic
    }


class FastSpectrum(nn.Module):
    """The layer's `modulated_spectrum` as a product with a 0/1 matrix: the same numbers.

    Scatter and its gradient are slow on a CPU; a step is a fifth faster without them.
    """

    def __init__(self, layer: FDConv2d) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, so that it is not registered below itself
        groups, bins = layer.kernel_num, layer.rows * (layer.columns // 2 + 1)
        rows, columns = layer.indices[0]
        self.spread = torch.zeros(groups, bins)
        flat = rows * (layer.columns // 2 + 1) + columns
        self.spread.scatter_(1, flat, 1.0)

    def forward(self, attention: Tensor) -> Tensor:
        """``(B, G)`` -> ``(B, R, C/2+1, 2)``."""
        layer = self.layer[0]
        gain = (attention @ self.spread).reshape(-1, layer.rows, layer.columns // 2 + 1, 1)
        return layer.dft_weight * layer.alpha * gain


def quicken(network: nn.Module) -> None:
    """Give every dynamic layer a `FastSpectrum`, which changes no state dict."""
    for layer in dynamic_layers(network).values():
        object.__setattr__(layer, "modulated_spectrum", FastSpectrum(layer))


def parameter_groups(network: nn.Module, recipe: Rates) -> list[dict[str, Any]]:
    """AdamW's groups: no decay on vectors; rates that let the baselines learn alike.

    AdamW moves each number by about the learning rate. Moving every bin of a stored spectrum
    by r moves its kernel's weights by r · scale / sqrt(R·C / 2) only, three to four times
    less than r; the group's rate makes up for it. Attention and band modulation start from
    nothing where all else is trained: they get `attention_factor` times the rate.
    """
    factors: dict[int, float] = {}
    for layer in dynamic_layers(network).values():
        factors |= {id(p): recipe.attention_factor for p in layer.parameters()}
        scale = math.sqrt(layer.rows * layer.columns / 2) / layer.spectrum_scale
        factors[id(layer.dft_weight)] = scale
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in network.parameters():
        factor = round(factors.get(id(parameter), 1.0), 1)
        decay = recipe.weight_decay / factor if parameter.ndim > 1 else 0.0
        groups[factor, decay].append(parameter)
    return [
        {"params": members, "factor": factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]
