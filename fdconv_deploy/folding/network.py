"""Any network with FDConv layers -> the same network for one input shape, layers folded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.layer import FoldedConv, convolved_size, fold_layer, padding_of
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.nn.fdconv import FDConv2d, FDTokenConv, dynamic_layers

# What a network takes: one tensor, or several.
Example = Tensor | tuple[Tensor, ...]


def tensors_of(example: Example) -> tuple[Tensor, ...]:
    """The tensors of an example, be it one or several."""
    return (example,) if isinstance(example, Tensor) else example


def input_sizes(network: nn.Module, example: Example) -> dict[str, tuple[int, int]]:
    """Height and width that each dynamic layer sees when the network runs on ``example``.

    Of a layer over tokens their number in an image, and 1.

    Raises:
        ExportError: a layer is never run, or runs at two sizes (it has no one static shape).
    """
    layers = dynamic_layers(network)
    seen: dict[str, set[tuple[int, int]]] = {name: set() for name in layers}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shape = inputs[0].shape
        over_tokens = isinstance(module, FDTokenConv)
        seen[name].add((math.prod(shape[1:-1]), 1) if over_tokens else (shape[-2], shape[-1]))

    hooks = [m.register_forward_pre_hook(partial(record, n)) for n, m in layers.items()]
    try:
        with torch.no_grad():
            network(*tensors_of(example))
    finally:
        for hook in hooks:
            hook.remove()
    for name, sizes in seen.items():
        if not sizes:
            raise ExportError(
                f"FDConv layer {name!r} is not used by the network's forward pass, so it has no "
                "input size. Remove it, or call it in forward."
            )
        if len(sizes) > 1:
            raise ExportError(
                f"FDConv layer {name!r} is used at several input sizes, {sorted(sizes)}: a static "
                "graph needs one. Give each use a layer of its own (weights may be shared)."
            )
    return {name: sizes.pop() for name, sizes in seen.items()}


def replace_layers(network: nn.Module, make: Callable[[str, FDConv2d], nn.Module]) -> nn.Module:
    """A copy of ``network`` with each dynamic layer replaced, wherever it is referred to.

    The layers themselves, and so their spectra, are never copied.
    """
    layers = dynamic_layers(network)
    # deepcopy takes what is in the memo for what was copied already.
    memo: dict[int, object] = {id(layer): make(name, layer) for name, layer in layers.items()}
    return copy.deepcopy(network, memo)


def fold_network(network: nn.Module, example: Example) -> nn.Module:
    """A copy of ``network`` whose FDConv layers are folded for ``example``'s shape.

    Its folded layers take inputs of these sizes only; the batch size is free.

    Args:
        network: in eval mode; not changed.
        example: one input, e.g. ``(1, 3, H, W)`` float32.
    """
    if network.training:
        raise ExportError("the network is in training mode; call .eval() before folding.")
    folded = fold_layers(network, example)
    return replace_layers(network, lambda name, _layer: FoldedConv2d(folded[name]))


def fold_layers(network: nn.Module, example: Example) -> dict[str, FoldedConv]:
    """A network's dynamic layers by name, each folded at the size it has in ``example``."""
    sizes = input_sizes(network, example)
    return {
        name: fold_layer(layer, sizes[name], name=name)
        for name, layer in dynamic_layers(network).items()
    }


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


def layer_stand_in(name: str, layer: FDConv2d) -> nn.Module:
    """For a dynamic layer: the operator ``fdconv_deploy::folded_layer`` of its name."""

    def over_map(x: Tensor) -> Tensor:
        size = convolved_size(layer, x.shape[-2:], padding_of(layer))
        return _folded_layer(x, name, (layer.out_channels, *size))

    def over_tokens(x: Tensor) -> Tensor:
        # However many axes an image's tokens are in, a folded layer sees one.
        tokens = x[:, None] if x.ndim == 2 else x.flatten(1, -2)
        y = _folded_layer(tokens, name, (tokens.shape[1], layer.out_channels))
        return y.reshape(*x.shape[:-1], layer.out_channels)

    return StandIn(over_tokens if isinstance(layer, FDTokenConv) else over_map)
