"""``fdconv.nchwc::KernelAttention`` against float64: every form, layout and odd size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fdconv_deploy.folding.modulation import FoldedLocal, FoldedModulation, HiddenNorm
from tests.ops.native.blocked import pack, run_node
from tests.reference.lively import lively_input

LAYOUTS = [0, 8, 16, "tokens"]


def layer_of(
    channels: int, hidden: int, sizes: tuple[int, ...], norm: int, softmax: bool = False
) -> tuple[FoldedModulation, FoldedLocal]:
    """Weights of a trained layer's size; ``norm`` as the node's attribute."""
    random = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    gain, shift = 1 + weights(hidden), weights(hidden)
    norms = [None, HiddenNorm(gain, shift, 1e-5), HiddenNorm(gain, None, 1e-6)]
    modulation = FoldedModulation(
        weights(hidden, channels), weights(hidden), weights(sum(sizes), hidden),
        weights(sum(sizes)), *(*sizes, 0, 0, 0)[:4], softmax=softmax, gain=1.0, norm=norms[norm],
        squared=norm != 2,
    )  # fmt: skip
    local = FoldedLocal(1 + weights(channels), weights(channels), 1e-5, weights(1, 3), 3, 2.0)
    return modulation, local


def by_reference(x: np.ndarray, m: FoldedModulation, local: FoldedLocal) -> list[np.ndarray]:
    """Gates and the normalised average in float64; x is ``(N, I, positions)``."""

    def normalised(x, weight, bias, epsilon):
        if bias is None:
            return x / np.sqrt((x**2).mean(1, keepdims=True) + epsilon) * weight
        return (x - x.mean(1, keepdims=True)) / np.sqrt(
            x.var(1, keepdims=True) + epsilon
        ) * weight + bias

    average = x.astype(np.float64).mean(2)
    hidden = average @ m.hidden.T.astype(np.float64) + m.hidden_bias
    if m.norm is not None:
        hidden = normalised(hidden, m.norm.weight, m.norm.bias, m.norm.epsilon)
    hidden = np.maximum(hidden, 0) ** (2 if m.squared else 1)
    logits = hidden @ m.heads.T.astype(np.float64) + m.head_bias
    sizes = [n for n in (m.kernel, m.filter, m.spatial, m.channel) if n]
    if m.softmax:
        parts = np.split(np.exp(logits), np.cumsum(sizes)[:-1], 1)
        gates = np.concatenate([p / p.sum(1, keepdims=True) for p in parts], 1)
    else:
        gates = 1 / (1 + np.exp(-logits))
    return [gates, normalised(average, local.norm_weight, local.norm_bias, local.epsilon)]


def by_node(
    x: np.ndarray,
    m: FoldedModulation,
    local: FoldedLocal | None,
    layout: Any,
    library: Path,
    threads: int = 1,
) -> list[np.ndarray]:
    constants = [m.hidden, m.hidden_bias]
    attributes: dict[str, Any] = {
        "block": 0 if layout == "tokens" else layout,
        "norm": 0,
        "squared": int(m.squared),
        "softmax": int(m.softmax),
        "head_sizes": [n for n in (m.kernel, m.filter, m.spatial, m.channel) if n],
        "local": int(local is not None),
    }
    if m.norm is not None:
        constants += [m.norm.weight, *[m.norm.bias][: m.norm.bias is not None]]
        attributes |= {"norm": 2 if m.norm.bias is None else 1, "norm_epsilon": m.norm.epsilon}
    constants += [m.heads, m.head_bias]
    if local is not None:
        constants += [local.norm_weight, local.norm_bias]
        attributes["local_epsilon"] = local.epsilon
    if layout == "tokens":
        x = np.ascontiguousarray(x.reshape(*x.shape[:2], -1).transpose(0, 2, 1))
    elif layout:
        x = pack(x, layout)
    outputs = 1 if local is None else 2
    return run_node(
        "KernelAttention", x, constants, attributes, library, outputs=outputs, threads=threads
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize(
    ("channels", "hidden", "sizes", "softmax"),
    [
        (64, 16, (64, 64, 9, 64), False),  # a 3×3 layer
        (64, 16, (8, 32, 64), False),  # 1×1
        (33, 18, (5, 7, 9, 33), False),  # nothing fills a vector
        (70, 17, (3, 40, 70), True),
        (300, 5, (64,), True),
    ],
)
def test_every_form(
    channels: int, hidden: int, sizes: tuple[int, ...], softmax: bool, norm: int, layout: Any,
    library: Path,
) -> None:  # fmt: skip
    m, local = layer_of(channels, hidden, sizes, norm, softmax)
    for images, size in ((1, (16, 16)), (3, (7, 13)), (2, (1, 1))):
        x = lively_input((images, channels, *size)).numpy()
        expected = by_reference(x.reshape(*x.shape[:2], -1), m, local)
        actual = by_node(x, m, local, layout, library)
        for mine, theirs in zip(actual, expected, strict=True):
            assert mine.shape == theirs.shape
            assert np.abs(mine - theirs).max() <= 1e-6 * max(np.abs(theirs).max(), 1)
        (alone,) = by_node(x, m, None, layout, library)
        assert np.array_equal(alone, actual[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(200, 336), (97, 123)])
def test_averages_are_near_float64(size: tuple[int, int], layout: Any, library: Path) -> None:
    """As near as the portable graph's means over one axis after the other, flat maps too."""
    m, local = layer_of(24, 16, (8,), 0)
    lively = lively_input((1, 24, *size)).numpy() + 1
    flat = np.full_like(lively, 0.1) * np.arange(1, 25, dtype=np.float32)[:, None, None]
    # A normalised average tells the average: by no more than what it is divided by.
    for x in (lively, flat):
        average = x.astype(np.float64).mean((2, 3))
        (_, normalised) = by_node(x, m, local, layout, library)
        unscaled = (normalised - local.norm_bias) / local.norm_weight
        back = unscaled * np.sqrt(average.var() + local.epsilon) + average.mean()
        assert np.abs(back - average).max() <= 2e-7 * np.abs(average).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout: Any, library: Path) -> None:
    m, local = layer_of(100, 40, (64, 900, 9, 100), 1)
    x = lively_input((2, 100, 120, 90)).numpy()
    first, *others = (by_node(x, m, local, layout, library, n) for n in (1, 2, 5))
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("wrong", ["channels", "heads", "norm", "block"])
def test_what_does_not_fit_is_refused(wrong: str, library: Path) -> None:
    m, local = layer_of(20, 16, (8, 9), 1)
    x = lively_input((1, 21 if wrong == "channels" else 20, 4, 4)).numpy()
    if wrong == "heads":
        object.__setattr__(m, "heads", m.heads[:-1])
    if wrong == "norm":
        object.__setattr__(m, "norm", HiddenNorm(m.hidden_bias[:-1], m.hidden_bias, 1e-5))
    with pytest.raises(Exception, match="KernelAttention cannot run"):
        by_node(x, m, local, 0 if wrong != "block" else 4, library)
