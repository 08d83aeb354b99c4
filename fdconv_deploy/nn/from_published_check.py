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


@dataclass(frozen=True, eq=False)
class Conversion:
    """What a layer may be converted to, and what its original did not tell: one phrase each."""

    layer: FDConv2d
    assumed: tuple[str, ...]


def variant(name: str, what: str) -> UnsupportedLayerError:
    """The error that says what makes a layer a variant."""
    return UnsupportedLayerError(
        f"{name} looks like a copy of the published FDConv layer, but is a variant that cannot be "
        f"converted: {what}. Expected the published class (its attributes and tensors); put "
        "fdconv_deploy.nn.FDConv2d in its place, or open an issue with the variant's source."
    )


def compare_on_random(
    module: nn.Module, candidates: tuple[Conversion, ...], name: str
) -> Conversion:
    """Run a layer and its candidates on random images; the first candidate that is equal.

    Raises:
        UnsupportedLayerError: the original fails on them, or computes something else than each.
    """
    x = _probe(module)
    with _evaluating(module, *(c.layer for c in candidates)):
        try:
            expected = module(x)
        except Exception as error:
            raise variant(name, f"its own forward fails on {tuple(x.shape)}: {error}") from error
        return _equal(candidates, name, x, expected)[0]


def _equal(
    candidates: tuple[Conversion, ...], name: str, x: Tensor, expected: Any
) -> tuple[Conversion, ...]:
    """Those candidates that give what the original gave.

    Raises:
        UnsupportedLayerError: there is none.
    """
    errors = {}
    for candidate in candidates:
        found = candidate.layer(x)
        if not isinstance(expected, Tensor) or expected.shape != found.shape:
            what = (
                tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
            )
            raise variant(
                name, f"it gives {what} where the published layer gives {tuple(found.shape)}"
            )
        largest = float(expected.abs().max()) or 1.0
        errors[candidate] = float((found - expected).abs().max()) / largest
    equal = tuple(candidate for candidate, error in errors.items() if error <= TOLERANCE)
    if equal:
        return equal
    nearest = min(errors, key=lambda candidate: errors[candidate])
    suspects = f" (suspects: {'; '.join(nearest.assumed)})" if nearest.assumed else ""
    raise variant(
        name,
        f"its output differs from the published layer's by {errors[nearest]:.1e} of the largest "
        f"value, {TOLERANCE:.0e} is allowed{suspects}",
    )


def compare_inside(
    network: nn.Module,
    example: Tensor,
    found: Mapping[str, nn.Module],
    candidates: Mapping[str, tuple[Conversion, ...]],
) -> dict[str, Conversion]:
    """Run the network, and each layer's candidates on what the original is given.

    Args:
        network: in eval mode.
        example: its input.
        found: the originals in it, by name.
        candidates: for each of them.

    Returns:
        Of each layer the first candidate that is equal.

    Raises:
        UnsupportedLayerError: a layer computes something else than each of its candidates.
    """
    left = dict(candidates)

    def compare(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            left[name] = _equal(left[name], name, inputs[0], output)
            if len(left[name]) > 1:
                # What cannot tell two candidates apart, as a flat image, may be all the example
                # has; noise of its size can. The layer's own forward calls no hook.
                noise = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
                noise = noise.to(inputs[0])
                left[name] = _equal(left[name], name, noise, module.forward(noise))

        return hook

    hooks = [module.register_forward_hook(compare(name)) for name, module in found.items()]
    try:
        with _evaluating(network, *(c.layer for several in left.values() for c in several)):
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: several[0] for name, several in left.items()}


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
