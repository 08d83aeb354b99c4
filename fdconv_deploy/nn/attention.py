"""Multi-head attention over tokens, as plain matrix products."""

from __future__ import annotations

from torch import Tensor


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """``(B, L, C)`` -> ``(B, heads, L, C/heads)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_together(x: Tensor) -> Tensor:
    """``(B, heads, L, D)`` -> ``(B, L, heads·D)``."""
    return x.transpose(1, 2).flatten(2)


def weigh(query: Tensor, key: Tensor, value: Tensor, *biases: Tensor) -> Tensor:
    """Values weighed by the softmax of ``query · keyᵀ / √D`` plus biases.

    Args:
        query: ``(…, L, D)``.
        key, value: ``(…, S, D)``.
        biases: what is added before the softmax, each broadcast to ``(…, L, S)``.

    Returns:
        ``(…, L, D)``.
    """
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    for bias in biases:
        logits = logits + bias
    return logits.softmax(-1) @ value
