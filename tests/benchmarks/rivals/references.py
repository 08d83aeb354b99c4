"""Each rival's definition, spelled out image by image and number by number in float64.

Kernels are formed whole, as the papers write them; the layers scale features instead where
that is the same. Written from the papers' equations, not from the layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]


def numbers(layer: nn.Module) -> dict[str, Array]:
    """A layer's tensors in float64."""
    return {k: v.detach().double().numpy() for k, v in layer.state_dict().items()}


def convolve(image: Array, kernel: Array, stride: int, padding: int, dilation: int) -> Array:
    """(I, H, W) with (O, I, k, k), tap by tap."""
    size = kernel.shape[-1]
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    reach = dilation * (size - 1)
    height = (padded.shape[1] - reach - 1) // stride + 1
    width = (padded.shape[2] - reach - 1) // stride + 1
    out = np.zeros((kernel.shape[0], height, width))
    for o in range(kernel.shape[0]):
        for i in range(kernel.shape[1]):
            for r in range(size):
                for c in range(size):
                    rows = slice(r * dilation, r * dilation + stride * (height - 1) + 1, stride)
                    columns = slice(c * dilation, c * dilation + stride * (width - 1) + 1, stride)
                    out[o] += kernel[o, i, r, c] * padded[i, rows, columns]
    return out


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    return np.exp(x) / np.exp(x).sum()


def normed(x: Array, tensors: dict[str, Array], name: str) -> Array:
    """Batch normalisation in eval mode, channels first."""
    mean, variance, weight, bias = (
        tensors[f"{name}.{part}"].reshape(-1, *[1] * (x.ndim - 1))
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def condconv(image: Array, t: dict[str, Array]) -> Array:
    experts = sigmoid(t["routing.weight"] @ image.mean((1, 2)) + t["routing.bias"])
    return sum(share * kernel for share, kernel in zip(experts, t["weight"], strict=True))


def dyconv(image: Array, t: dict[str, Array]) -> Array:
    hidden = np.maximum(t["squeeze.weight"] @ image.mean((1, 2)), 0)
    shares = softmax(t["attend.weight"] @ hidden)
    return sum(share * kernel for share, kernel in zip(shares, t["weight"], strict=True))


def odconv(image: Array, t: dict[str, Array]) -> Array:
    pooled = image.mean((1, 2))
    hidden = np.maximum(normed(t["squeeze.weight"][:, :, 0, 0] @ pooled, t, "norm"), 0)

    def head(name: str) -> Array:
        return t[f"{name}.weight"] @ hidden + t[f"{name}.bias"]

    kernels, channel, outputs = softmax(head("kernel")), sigmoid(head("channel")), head("filter")
    _, out, into, size, _ = t["weight"].shape
    taps = np.ones((size, size))
    if size > 1:
        taps = sigmoid(head("tap")).reshape(size, size)
    kernel = np.zeros((out, into, size, size))
    for n, share in enumerate(kernels):
        for o in range(out):
            for i in range(into):
                scale = share * sigmoid(outputs[o]) * channel[i]
                kernel[o, i] += scale * taps * t["weight"][n, o, i]
    return kernel


def warehouse(image: Array, t: dict[str, Array], out: int, into: int, size: int) -> Array:
    """Cell by cell: taps outermost, then output channels, then input channels."""
    cells = t["cells"]
    count, rows, columns = cells.shape
    hidden = np.maximum(normed(t["squeeze.weight"] @ image.mean((1, 2)), t, "norm"), 0)
    attention = (t["attend.weight"] @ hidden + t["attend.bias"]).reshape(-1, count + 1)
    kernel = np.zeros((out, into, size, size))
    mixture = 0
    for r in range(size):
        for c in range(size):
            for top in range(0, out, rows):
                for left in range(0, into, columns):
                    weights = attention[mixture] / (np.abs(attention[mixture]).sum() + 1e-3)
                    for n in range(count):  # the last weight is the empty cell's
                        place = kernel[top : top + rows, left : left + columns, r, c]
                        place += weights[n] * cells[n]
                    mixture += 1
    assert mixture == len(attention)
    return kernel


def dcd(image: Array, t: dict[str, Array], stride: int, padding: int, dilation: int) -> Array:
    """The layer's output: its normalisations make it affine, so no one kernel says it all."""

    def hard(x: Array) -> Array:
        return np.clip(x + 3, 0, 6) / 3

    hidden = t["squeeze.weight"] @ image.mean((1, 2))
    hidden = hidden * hard(t["gate.weight"] @ hidden)
    narrow = len(t["q.weight"])
    phi = (t["phi.weight"] @ hidden).reshape(narrow, narrow)
    scale = hard(t["scale.weight"] @ hidden)
    out = convolve(image, scale[:, None, None, None] * t["weight"], stride, padding, dilation)
    z = normed(convolve(image, t["q.weight"], stride, 0, 1), t, "q_norm")
    p = t["p.weight"][:, :, 0, 0]
    for row in range(z.shape[1]):
        for column in range(z.shape[2]):
            here = z[:, row, column]
            out[:, row, column] += p @ (normed(phi @ here, t, "phi_norm") + here)
    return out
