"""Which frequency order a checkpoint was trained with, by images and its stored statistics.

BatchNorms store the mean and variance of what reached them in training. A network in the order
it was trained with sees about those on images of the same kind; in another order, what reaches
the BatchNorms behind its FDConv layers is off, the more the deeper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fdconv_deploy.checkpoints.frequency_order.from_weights import NamedOrder
from fdconv_deploy.errors import ImageError

# Images that bring the nearest order no nearer than this are of another kind, and then a wrong
# order can come out far nearer. Below it, what separates any images from those of training moves
# both orders' distances alike: a wrong one can be nearer in nearly all BatchNorms, since they see
# the same images, but by a hair. So it takes a factor. benchmarks/frequency_order.py measures it.
NEAR = 0.05
FACTOR = 2.0
FEWEST = 8


class ImageEvidence(BaseModel):
    """How near each order comes to the stored statistics.

    Attributes:
        order: the order they are of, or None: images do not show it.
        reason: in a sentence.
        images: how many were looked at.
        norms: BatchNorms whose input differs between the orders.
        distances: of each order: Kullback-Leibler divergence, in nats, of the inputs' normal
            distribution from the stored one, the mean over channels and BatchNorms.
        factor: how many times as far the next order is as the nearest, the geometric mean over
            BatchNorms.
    """

    model_config = ConfigDict(frozen=True)

    order: NamedOrder | None
    reason: str
    images: int
    norms: int
    distances: dict[str, float]
    factor: float


def order_of_statistics(
    networks: Mapping[NamedOrder, nn.Module], inputs: Iterable[Tensor]
) -> ImageEvidence:
    """Compare orders on images.

    Args:
        networks: of each order, the same network in it, in eval mode.
        inputs: ``(1, C, H, W)`` float32 each, as the network takes them; any sizes.

    Raises:
        ImageError: there are fewer than eight.
    """
    sums: dict[NamedOrder, dict[str, Tensor]] = {order: {} for order in networks}
    hooks = [
        norm.register_forward_pre_hook(partial(_add_moments, sums[order], name))
        for order, network in networks.items()
        for name, norm in _norms(network).items()
    ]
    count = 0
    try:
        with torch.no_grad():
            for x in inputs:
                count += 1
                for network in networks.values():
                    network(x)
    finally:
        for hook in hooks:
            hook.remove()
    if count < FEWEST:
        raise ImageError(
            f"The order's check needs {FEWEST} images or more, found {count}. Give a folder of "
            "images of the kind the network was trained on."
        )
    divergences = {
        order: {name: _divergence(norm, sums[order][name] / count) for name, norm in norms.items()}
        for order, norms in ((order, _norms(network)) for order, network in networks.items())
    }
    return _judge(divergences, count)


def _add_moments(
    sums: dict[str, Tensor], name: str, _: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    """Add an image's mean and mean square, ``(2, C)`` float64, of what reaches a BatchNorm."""
    seen = inputs[0].double()
    moments = torch.stack([seen.mean((0, 2, 3)), seen.square().mean((0, 2, 3))])
    sums[name] = sums.get(name, 0) + moments


def _norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Those that see feature maps: an attention's own sees one number per image."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and module.running_mean is not None
        and ".KSM_Global." not in f".{name}."
    }


def _divergence(norm: nn.BatchNorm2d, moments: Tensor) -> float:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, square = moments
    variance = (square - mean**2).clamp_min(0) + norm.eps
    stored = norm.running_var.double() + norm.eps
    off = (variance + (mean - norm.running_mean.double()) ** 2) / stored
    return float((0.5 * (torch.log(stored / variance) + off - 1)).mean())


def _judge(divergences: Mapping[NamedOrder, Mapping[str, float]], images: int) -> ImageEvidence:
    first = next(iter(divergences.values()))
    norms = [
        key for key in first if any(abs(d[key] - first[key]) > 1e-12 for d in divergences.values())
    ]
    distances: dict[str, float] = {
        name: float(np.mean([found[key] for key in norms])) if norms else 0.0
        for name, found in divergences.items()
    }

    evidence = partial(ImageEvidence, images=images, norms=len(norms), distances=distances)
    if not norms:
        reason = "The images do not show the order: no BatchNorm's input depends on the order."
        return evidence(order=None, reason=reason, factor=1.0)
    logs = {n: np.log([max(f[key], 1e-30) for key in norms]) for n, f in divergences.items()}
    best, second = sorted(logs, key=lambda name: float(logs[name].mean()))[:2]
    factor = math.exp(min(float((logs[second] - logs[best]).mean()), 100.0))
    shown = ", ".join(f"{name!r} {value:.3g}" for name, value in distances.items())
    order: NamedOrder | None = None
    if distances[best] > NEAR:
        reason = (
            "The images do not show the order: what reaches the BatchNorms is far from what they "
            f"store ({shown} nats, {NEAR} is near), so they are not of the kind the network was "
            "trained on."
        )
    elif factor < FACTOR:
        reason = (
            "The images do not show the order: both are equally near to the stored "
            f"statistics ({shown} nats; the other {factor:.2f} times as far as {best!r}, at least "
            f"{FACTOR:g} times are needed)."
        )
    else:
        order = best
        reason = (
            f"The stored statistics are those of the order {best!r}: {shown} nats away, the other "
            f"{factor:.2g} times as far."
        )
    return evidence(order=order, reason=reason, factor=factor)
