"""What transformers are made of: tokens, attention over them, feed-forward networks.

Attention is multi-head as plain matrix products, or deformable over several maps (Deformable DETR),
as mmcv's ``multi_scale_deformable_attn_pytorch`` computes it: by ``grid_sample``, bilinear, with
zeros outside. Sizes of maps are Python numbers, so all that follows from them is constant.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import FDConvConfig
from fdconv_deploy.nn.fdconv import linear_or_fdconv
from fdconv_deploy.nn.spectrum import FrequencyOrder

Size = tuple[int, int]


def to_tokens(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` -> ``(B, H·W, C)``."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, size: Size) -> Tensor:
    """``(B, H·W, C)`` -> ``(B, C, H, W)``."""
    return x.transpose(1, 2).unflatten(2, size)


class PatchEmbedding(nn.Module):
    """A map's patches as tokens, side by side or overlapping."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        size: int,
        stride: int,
        *,
        padding: int = 0,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, size, stride, padding)
        self.norm = nn.LayerNorm(channels, epsilon)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """``(B, I, H, W)`` -> tokens ``(B, L, C)``, and the height and width of their map."""
        x = self.projection(x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


def feed_forward(
    channels: int,
    hidden: int,
    activation: nn.Module,
    conv: FDConvConfig | None,
    order: FrequencyOrder,
) -> nn.Sequential:
    """Linear, activation, linear of tokens ``(B, L, C)``; ``conv`` makes both FDConv."""
    first = linear_or_fdconv(conv, channels, hidden, order=order)
    second = linear_or_fdconv(conv, hidden, channels, order=order)
    layers = nn.Sequential(nn.Sequential(first, activation), second)
    return nn.Sequential(OrderedDict(layers=layers))


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """``(B, L, C)`` -> ``(B, heads, L, C/heads)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_together(x: Tensor) -> Tensor:
    """``(B, heads, L, D)`` -> ``(B, L, heads·D)``."""
    return x.transpose(1, 2).flatten(2)


def weigh(query: Tensor, key: Tensor, value: Tensor, *biases: Tensor) -> Tensor:
    """Values ``(…, S, D)`` weighed by the softmax of ``query · keyᵀ / √D + biases``.

    ``query`` and the answer are ``(…, L, D)``; each of ``biases`` is broadcast to ``(…, L, S)``.
    """
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    for bias in biases:
        logits = logits + bias
    return logits.softmax(-1) @ value


def attend(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *biases: Tensor
) -> Tensor:
    """What torch's layer computes of ``(B, L, C)`` and ``(B, S, C)``, as plain products.

    ``biases`` are added to the logits ``(B, heads, L, S)``.
    """
    channels, parts = query.shape[-1], []
    for number, x in enumerate((query, key, value)):
        rows = slice(number * channels, (number + 1) * channels)
        weight, offset = attention.in_proj_weight[rows], attention.in_proj_bias[rows]
        parts.append(heads_apart(F.linear(x, weight, offset), attention.num_heads))
    q, k, v = parts
    mixed = heads_together(weigh(q, k, v, *biases))
    return F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias)


def sine_encoding(size: Size, channels: int, like: Tensor) -> Tensor:
    """The encoding of every place of a map, ``(1, H·W, channels)`` of the type of ``like``.

    Rows first, then columns, each of ``channels / 2``; sines at even places and cosines at odd
    ones share a frequency. Rows and columns count from 1, and 2π is the last. Computed in float32.
    """
    rows, columns = (part.to(like) for part in _sine_parts(size, channels))
    return (rows + columns).flatten(0, 1)[None]


@lru_cache(maxsize=64)
def _sine_parts(size: Size, channels: int) -> tuple[Tensor, Tensor]:
    """Rows ``(H, 1, channels)`` and columns ``(1, W, channels)``, zero where the other is.

    A graph keeps these: their sum over the map would be some 5 % of a Mask2Former's weights.
    """
    features = channels // 2
    exponent = 2 * (np.arange(features) // 2) / np.float32(features)
    frequency = np.float32(10000) ** exponent.astype(np.float32)

    def encode(length: int, before: int, after: int) -> Tensor:
        place = np.arange(1, length + 1, dtype=np.float32)
        place = place / (np.float32(length) + np.float32(1e-6)) * np.float32(2 * math.pi)
        angle = place[:, None] / frequency
        both = np.where(np.arange(features) % 2 == 0, np.sin(angle), np.cos(angle))
        return F.pad(torch.from_numpy(both.astype(np.float32)), (before, after))

    height, width = size
    return encode(height, 0, features)[:, None], encode(width, features, 0)[None]


@lru_cache(maxsize=64)
def cell_centres(sizes: tuple[Size, ...]) -> Tensor:
    """The centre of every place of several maps, ``(1, places, 2)`` float32 x, y of 0 to 1."""
    maps = []
    for height, width in sizes:
        y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
        maps.append(np.stack([x / width, y / height], axis=-1).reshape(1, -1, 2))
    return torch.from_numpy(np.concatenate(maps, axis=1).astype(np.float32))


class MultiScaleDeformableAttention(nn.Module):
    """Each query samples every level at a few points about its own place, for each head."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    def forward(
        self, query: Tensor, value: Tensor, sizes: Sequence[Size], reference: Tensor
    ) -> Tensor:
        """Queries ``(B, Q, C)`` -> the same shape.

        Args:
            value: ``(B, places, C)``, map after map.
            sizes: (height, width) of each map.
            reference: ``(1 or B, Q, 2)``, x and y, offsets then being pixels of the level sampled;
                or ``(B, Q, 4)`` boxes x, y, w, h, offsets then being shares of half of them.
        """
        batch, queries, channels = query.shape
        heads, levels, points = self.heads, self.levels, self.points
        value = heads_apart(self.value_proj(value), heads).transpose(2, 3).flatten(0, 1)
        offsets = self.sampling_offsets(query).reshape(batch, queries, heads, levels, points, 2)
        weights = self.attention_weights(query).reshape(batch, queries, heads, levels * points)
        weights = weights.softmax(-1).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        place = reference[:, :, None, None, None]
        if reference.shape[-1] == 2:
            whole = [[[width, height]] for height, width in sizes]
            places = place + offsets / torch.tensor(whole, dtype=offsets.dtype).to(offsets)
        else:
            places = place[..., :2] + offsets / points * place[..., 2:] * 0.5
        # (B · heads, Q, levels, points, 2), of −1 to 1.
        grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)
        samples, start = [], 0
        for level, (height, width) in enumerate(sizes):
            image = value[:, :, start : start + height * width].unflatten(2, (height, width))
            start += height * width
            samples.append(F.grid_sample(image, grids[:, :, level], align_corners=False))
        mixed = (torch.cat(samples, dim=-1) * weights).sum(-1)
        return self.output_proj(mixed.reshape(batch, channels, queries).transpose(1, 2))
