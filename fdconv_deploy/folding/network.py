"""Any network with FDConv layers -> the same network for one input shape, layers folded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.layer import DynamicLayer, FoldedConv, fold_layer
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.nn.fdconv import FDConv2d, FDTokenConv
from fdconv_deploy.nn.fdlinear import FDLinear

# What a network takes: one tensor, or several.
Example = Tensor | tuple[Tensor, ...]


def tensors_of(example: Example) -> tuple[Tensor, ...]:
    """The tensors of an example, be it one or several."""
    return (example,) if isinstance(example, Tensor) else example


def foldable_layers(network: nn.Module) -> dict[str, DynamicLayer]:
    """A network's dynamic layers of every kind by name, each once though it be shared."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, FDLinear) or (isinstance(module, FDConv2d) and module.is_dynamic)
    }


def input_sizes(network: nn.Module, example: Example) -> dict[str, tuple[int, int]]:
    """Height and width that each dynamic layer sees when the network runs on ``example``.

    Of a layer over tokens their number in an image, and 1.

    Raises:
        ExportError: a layer is never run, or runs at two sizes (it has no one static shape).
    """
    layers = foldable_layers(network)
    seen: dict[str, set[tuple[int, int]]] = {name: set() for name in layers}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shape = inputs[0].shape
            if isinstance(module, FDLinear | FDTokenConv):
                seen[name].add((math.prod(shape[1:-1]), 1))
            else:
                seen[name].add((shape[-2], shape[-1]))

        return record

    hooks = [m.register_forward_pre_hook(recorder(n)) for n, m in layers.items()]
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


def replace_layers(network: nn.Module, make: Callable[[str, DynamicLayer], nn.Module]) -> nn.Module:
    """A copy of ``network`` with each dynamic layer replaced, wherever it is referred to.

    The layers themselves, and so their spectra, are never copied.
    """
    layers = foldable_layers(network)
    # deepcopy takes what is in the memo for what was copied already.
    memo: dict[int, object] = {id(layer): make(name, layer) for name, layer in layers.items()}
    return copy.deepcopy(network, memo)


def fold_network(network: nn.Module, example: Example) -> nn.Module:
    """A copy of ``network`` whose FDConv layers are folded for ``example``'s shape.

    Args:
        network: in eval mode; not changed.
        example: one input, e.g. ``(1, 3, H, W)`` float32. The batch size is free afterwards.

    Returns:
        The copy. Its folded layers take inputs of the recorded sizes only.
    """
    if network.training:
        raise ExportError("the network is in training mode; call .eval() before folding.")
    folded = fold_layers(network, example)
    return replace_layers(network, lambda name, _layer: FoldedConv2d(folded[name]))


def fold_layers(network: nn.Module, example: Example) -> dict[str, FoldedConv]:
    """A network's dynamic layers by name, each folded at the size it has in ``example``.

    Raises:
        ExportError: as `input_sizes`.
    """
    sizes = input_sizes(network, example)
    return {
        name: fold_layer(layer, sizes[name], name=name)
        for name, layer in foldable_layers(network).items()
    }
