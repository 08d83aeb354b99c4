"""Mask2Former's head (https://arxiv.org/abs/2112.01527), by mmdetection's parameter names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fdconv_deploy.config import Mask2FormerHeadConfig
from fdconv_deploy.nn.heads.decode_heads import resize
from fdconv_deploy.nn.heads.query_head import Below, QueryHead
from fdconv_deploy.nn.spectrum import FrequencyOrder
from fdconv_deploy.nn.transformer import attend, feed_forward, sine_encoding, to_tokens

# The published rule hides a place where a float32 sigmoid is below 0.5. It is 0.5 down to this
# logit: exp of less rounds to 1 + 2^-23, and 2 + 2^-23 to 2. No runtime's sigmoid need agree then.
HIDDEN_BELOW = -1.5 * 2**-23


class Attention(nn.Module):
    """Holds a MultiheadAttention under mmcv's name for it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *biases: Tensor) -> Tensor:
        """As `attend`."""
        return attend(self.attn, query, key, value, *biases)


class DecoderLayer(nn.Module):
    """Attention to a level's visible places, among queries, and a feed-forward network."""

    def __init__(self, config: Mask2FormerHeadConfig, order: FrequencyOrder) -> None:
        super().__init__()
        channels, heads = config.hidden_channels, config.decoder_heads
        self.pre_norm = config.pre_norm
        self.self_attn = Attention(channels, heads)
        self.cross_attn = Attention(channels, heads)
        self.ffn = feed_forward(channels, config.decoder_feedforward, nn.ReLU(), config.conv, order)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(
        self, x: Tensor, places: Tensor, keys: Tensor, values: Tensor, hidden: Tensor
    ) -> Tensor:
        """Queries ``(B, Q, C)`` -> the same shape; a level's ``keys``, ``values`` ``(B, S, C)``.

        ``places``: the queries' own encoding ``(Q, C)``, which values do not hold. ``hidden``:
        ``(B, Q, S)``, 1 where hidden. A query that may see nothing sees everything.
        """
        nothing = hidden.amin(-1, keepdim=True)
        bias = torch.where(hidden - nothing > 0, -torch.inf, 0.0).to(x)[:, None]

        def cross(x: Tensor) -> Tensor:
            return self.cross_attn(x + places, keys, values, bias)

        def among(x: Tensor) -> Tensor:
            return self.self_attn(x + places, x + places, x)

        parts: tuple[Callable[[Tensor], Tensor], ...] = (cross, among, self.ffn)
        for norm, part in zip(self.norms, parts, strict=True):
            x = x + part(norm(x)) if self.pre_norm else norm(x + part(x))
        return x


class Mask2FormerHead(QueryHead):
    """A pixel decoder, and queries that attend to it where their last masks were."""

    def __init__(self, config: Mask2FormerHeadConfig, order: FrequencyOrder) -> None:
        super().__init__(config, order)
        width, queries, levels = config.hidden_channels, config.num_queries, len(config.levels)
        layers = [DecoderLayer(config, order) for _ in range(config.decoder_layers)]
        self.transformer_decoder = nn.ModuleDict(
            {"layers": nn.ModuleList(layers), "post_norm": nn.LayerNorm(width)}
        )
        self.decoder_input_projs = self._input_projections(levels)
        # 1 where a place is hidden from a query.
        self.attention_mask = Below(HIDDEN_BELOW)
        self.query_embed = nn.Embedding(queries, width)
        self.query_feat = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(levels, width)
        self.cls_embed = nn.Linear(width, config.class_outputs)
        self.mask_embed = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, config.mask_channels),
        )

    def predict(self, queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and mask logits of queries ``(B, Q, C)`` on mask features."""
        normal = self.transformer_decoder["post_norm"](queries)
        masks = self.mask_embed(normal) @ features.flatten(2)
        return self.cls_embed(normal), masks.unflatten(2, features.shape[-2:])

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``outputs``: the backbone's, each ``(B, C, h, w)``, finest first."""
        features, memories = self.pixel_decoder(outputs)
        sizes = [(memory.shape[2], memory.shape[3]) for memory in memories]
        keys, values = [], []
        for memory, project, embedding, size in zip(
            memories, self.decoder_input_projs, self.level_embed.weight, sizes, strict=True
        ):
            value = to_tokens(project(memory)) + embedding
            values.append(value)
            keys.append(value + sine_encoding(size, self.config.hidden_channels, value))
        queries = self.query_feat.weight.expand(features.shape[0], -1, -1)
        classes, masks = self.predict(queries, features)
        layers = cast(Iterable[DecoderLayer], self.transformer_decoder["layers"])
        for number, layer in enumerate(layers):
            level = number % len(sizes)
            hidden = self.attention_mask(resize(masks, sizes[level], False).flatten(2))
            queries = layer(queries, self.query_embed.weight, keys[level], values[level], hidden)
            classes, masks = self.predict(queries, features)
        return classes, masks
