"""A copy of the published layer run beside its conversion: the same, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.fdconv import FDConv2d

# Largest difference allowed between a copy and its conversion, of the output's largest value.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Conversion:
    """A converted layer, and what its original did not tell: one phrase each."""

    layer: FDConv2d
    assumed: tuple[str, ...]


def variant(name: str, what: str) -> UnsupportedLayerError:
    """The error that says what makes a layer a variant."""
    return UnsupportedLayerError(
        f"{name} looks like a copy of the published FDConv layer, but is a variant that cannot be "
        f"converted: {what}. Expected the published class (its attributes and tensors); put "
        "fdconv_deploy.nn.FDConv2d in its place, or open an issue with the variant's source."
    )


def compare_on_random(module: nn.Module, conversion: Conversion, name: str) -> None:
    """Run both on random images.

    :raises UnsupportedLayerError: the original fails on them, or computes something else.
    """
    x = _probe(module)
    with _evaluating(module, conversion.layer):
        try:
            expected = module(x)
        except Exception as error:
            raise variant(name, f"its own forward fails on {tuple(x.shape)}: {error}") from error
        _compare(conversion, name, x, expected)


def _compare(conversion: Conversion, name: str, x: Tensor, expected: Any) -> None:
    found = conversion.layer(x)
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        what = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
        raise variant(name, f"it gives {what} where the published layer gives {tuple(found.shape)}")
    largest = float(expected.abs().max()) or 1.0
    error = float((found - expected).abs().max()) / largest
    if not error <= TOLERANCE:
        suspects = f" (suspects: {'; '.join(conversion.assumed)})" if conversion.assumed else ""
        raise variant(
            name,
            f"its output differs from the published layer's by {error:.1e} of the largest value, "
            f"{TOLERANCE:.0e} is allowed{suspects}",
        )


def compare_inside(
    network: nn.Module,
    example: Tensor,
    found: Mapping[str, nn.Module],
    conversions: Mapping[str, Conversion],
) -> None:
    """Run the network, and each conversion on what its original is given.

    :param found: the originals in the network, by name.
    :raises UnsupportedLayerError: one computes something else.
    """

    def compare(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            _compare(conversions[name], name, inputs[0], output)

        return hook

    hooks = [module.register_forward_hook(compare(name)) for name, module in found.items()]
    try:
        with _evaluating(network, *(c.layer for c in conversions.values())):
            network(example)
    finally:
        for hook in hooks:
            hook.remove()


def _probe(module: nn.Module) -> Tensor:
    """Random images whose averages differ, large enough for any kernel."""
    conv: Any = module
    generator = torch.Generator().manual_seed(0)
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    shape = (2, conv.in_channels, max(9, reach[0]), max(11, reach[1]))
    offsets = torch.randn(*shape[:2], 1, 1, generator=generator)
    values = torch.randn(shape, generator=generator) + offsets
    first = next(module.parameters())
    return values.to(first.device, first.dtype)


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training
