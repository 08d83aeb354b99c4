"""Opaque operators that stand for layers while torch traces the network around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.folding.layer import DynamicLayer
from fdconv_deploy.nn.fdconv import FDTokenConv
from fdconv_deploy.nn.fdlinear import FDLinear


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of which a tracer knows the shapes that ``function`` gives, and no more."""
    name = f"fdconv_deploy::{function.__name__.removeprefix('_')}"
    operator = torch.library.custom_op(name, function, mutates_args=())
    operator.register_fake(function)
    return operator


@opaque
def _folded_layer(x: Tensor, layer: str, shape: Sequence[int]) -> Tensor:
    return x.new_zeros(x.shape[0], *shape)


class StandIn(nn.Module):
    """Takes a module's place while its network is traced, and calls an opaque operator."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        """What the operator gives."""
        return self.call(*inputs)


def layer_stand_in(name: str, layer: DynamicLayer) -> nn.Module:
    """For a dynamic layer: the operator ``fdconv_deploy::folded_layer`` of its name."""
    if isinstance(layer, FDLinear | FDTokenConv):
        return _token_stand_in(name, layer)
    padding = layer.padding

    def length(axis: int, size: int) -> int:
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        if isinstance(padding, str):
            added = reach if padding == "same" else 0
        else:
            added = 2 * padding[axis]
        return (size + added - reach - 1) // layer.stride[axis] + 1

    def call(x: Tensor) -> Tensor:
        height, width = length(0, x.shape[-2]), length(1, x.shape[-1])
        return _folded_layer(x, name, (layer.out_channels, height, width))

    return StandIn(call)


def _token_stand_in(name: str, layer: FDLinear | FDTokenConv) -> nn.Module:
    """Of an image's tokens, however many axes they are in, a layer sees one axis."""

    def call(x: Tensor) -> Tensor:
        tokens = x[:, None] if x.ndim == 2 else x.flatten(1, -2)
        y = _folded_layer(tokens, name, (tokens.shape[1], layer.out_features))
        return y.reshape(*x.shape[:-1], layer.out_features)

    return StandIn(call)
