"""MaskDINO's head (https://arxiv.org/abs/2206.02777), the decoder by its own parameter names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import MaskDINOHeadConfig
from fdconv_deploy.errors import ImageError
from fdconv_deploy.nn.fdconv import linear_or_fdconv
from fdconv_deploy.nn.heads.query_head import Best, QueryHead
from fdconv_deploy.nn.spectrum import FrequencyOrder
from fdconv_deploy.nn.transformer import (
    MultiScaleDeformableAttention,
    Size,
    attend,
    cell_centres,
    to_tokens,
)

# Features of each of a box's four numbers, whatever the decoder's width.
_BOX_FEATURES = 128
# Sides of the proposals of the first level, as shares of the image; twice that on each further.
_FIRST_SIDE = 0.05
_BORDER = 0.01


def inverse_sigmoid(x: Tensor) -> Tensor:
    """The logit of ``x``, which is kept 1e-5 from 0 and 1."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))


def encode_boxes(boxes: Tensor) -> Tensor:
    """Boxes ``(…, 4)`` x, y, w, h -> ``(…, 512)``, of y, x, w, h, sines beside cosines."""
    pairs = np.arange(_BOX_FEATURES // 2, dtype=np.float32) * 2 / np.float32(_BOX_FEATURES)
    frequency = torch.from_numpy(np.float32(10000) ** pairs).to(boxes)
    ordered = torch.cat([boxes[..., 1:2], boxes[..., :1], boxes[..., 2:]], dim=-1)
    angles = (ordered * (2 * math.pi))[..., None] / frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


@lru_cache(maxsize=16)
def proposals(sizes: tuple[Size, ...]) -> tuple[Tensor, Tensor]:
    """The boxes that the encoder's places propose.

    Logits ``(1, places, 4)`` float32 of x, y, w, h, infinite near the border; and ``(1, places,
    1)`` float32, 0 there, else 1.
    """
    sides = np.concatenate(
        [np.full(h * w, _FIRST_SIDE * 2**level) for level, (h, w) in enumerate(sizes)]
    )
    sides = np.repeat(sides[None, :, None], 2, axis=2).astype(np.float32)
    boxes = np.concatenate([cell_centres(sizes).numpy(), sides], axis=2)
    inside = ((boxes > _BORDER) & (boxes < 1 - _BORDER)).all(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = np.where(inside, np.log(boxes / (1 - boxes)), np.float32(np.inf))
    return torch.from_numpy(logits), torch.from_numpy(inside.astype(np.float32))


def boxes_of(masks: Tensor, *, exclusive: bool) -> Tensor:
    """The boxes around what of mask logits ``(B, Q, h, w)`` is above 0, ``(B, Q, 4)`` x, y, w, h.

    Shares of width and height. ``exclusive``: a box ends after its last pixel (detectron2's
    ``BitMasks``, of which an empty mask has the box 0, 0, 0, 0), else with it (``mask2box``).
    """
    height, width = masks.shape[-2:]
    found = (masks > 0).to(masks.dtype)
    ends = []
    for axis, length in ((2, width), (3, height)):
        there = found.amax(axis)
        place = torch.arange(length).to(masks)
        last = (there * (place + exclusive)).amax(-1)
        far = torch.where(there > 0, place, torch.full_like(there, 1e8)).amin(-1)
        first = torch.where(there.amax(-1) > 0, far, 0) if exclusive else far
        ends.append((first / length, last / length))
    (left, right), (top, bottom) = ends
    return torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1)


class MLP(nn.Module):
    """Linear layers, with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """``(…, I)`` -> ``(…, O)``."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DecoderLayer(nn.Module):
    """Attention among queries, deformable attention within their boxes, a feed-forward network."""

    def __init__(self, config: MaskDINOHeadConfig, levels: int, order: FrequencyOrder) -> None:
        super().__init__()
        width, heads = config.hidden_channels, config.decoder_heads
        hidden = config.decoder_feedforward
        self.cross_attn = MultiScaleDeformableAttention(width, heads, levels, config.decoder_points)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = linear_or_fdconv(config.conv, width, hidden, order=order)
        self.linear2 = linear_or_fdconv(config.conv, hidden, width, order=order)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, places: Tensor, boxes: Tensor, memory: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """Queries ``(B, Q, C)`` -> the same shape, of ``boxes`` ``(B, Q, 4)``.

        ``places``: the boxes' encoding, which values do not hold; ``memory``: ``(B, places, C)``.
        """
        x = self.norm2(x + attend(self.self_attn, x + places, x + places, x))
        x = self.norm1(x + self.cross_attn(x + places, memory, sizes, boxes))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class MaskDINOHead(QueryHead):
    """A pixel decoder, and queries that move their boxes over it."""

    def __init__(self, config: MaskDINOHeadConfig, order: FrequencyOrder) -> None:
        super().__init__(config, order)
        self.maskdino = config
        width = config.hidden_channels
        levels = len(config.levels) + config.extra_levels
        self.decoder_input_projs = self._input_projections(levels)
        if config.two_stage:
            self.enc_output = nn.Linear(width, width)
            self.enc_output_norm = nn.LayerNorm(width)
            self.best = Best(config.num_queries)
        else:
            self.query_embed = nn.Embedding(config.num_queries, 4)
        if config.has_query_feat:
            self.query_feat = nn.Embedding(config.num_queries, width)
        self.class_embed = nn.Linear(width, config.class_outputs)
        self.label_enc = nn.Embedding(config.num_classes, width)  # for training only
        self.mask_embed = MLP(width, width, width, config.mask_channels)
        self.decoder_norm = nn.LayerNorm(width)
        # One MLP under many names, as in checkpoints.
        self._bbox_embed = MLP(width, width, width, 4)
        self.bbox_embed = nn.ModuleList([self._bbox_embed] * config.decoder_layers)
        layers = [DecoderLayer(config, levels, order) for _ in range(config.decoder_layers)]
        self.decoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(layers),
                "norm": self.decoder_norm,
                "ref_point_head": MLP(4 * _BOX_FEATURES, width, width),
                "bbox_embed": self.bbox_embed,
            }
        )

    def class_scores(self, classes: Tensor) -> Tensor:
        """Scores ``(B, Q, classes)`` of class logits ``(B, Q, class_outputs)``."""
        if self.maskdino.class_scores == "softmax":
            return super().class_scores(classes)
        scores = classes.sigmoid()
        if self.maskdino.temperature is not None:
            scores = (scores / self.maskdino.temperature).softmax(-1)
        return scores[..., : self.maskdino.num_classes]

    def predict(self, queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and mask logits of queries ``(B, Q, C)`` on mask features."""
        normal = self.decoder_norm(queries)
        masks = self.mask_embed(normal) @ features.flatten(2)
        return self.class_embed(normal), masks.unflatten(2, features.shape[-2:])

    def begin(
        self, memory: Tensor, sizes: tuple[Size, ...], features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Contents ``(B, Q, C)`` and boxes ``(B, Q, 4)`` of the queries, 0 to 1."""
        batch = memory.shape[0]
        if not self.maskdino.two_stage:
            boxes = self.query_embed.weight.sigmoid().expand(batch, -1, -1)
            return self.query_feat.weight.expand(batch, -1, -1), boxes
        if memory.shape[1] < self.maskdino.num_queries:
            raise ImageError(
                f"This MaskDINO makes {self.maskdino.num_queries} queries of an image's tokens, "
                f"and an image of this size has {memory.shape[1]}. Give a larger size; if it was "
                "trained with fewer queries, its config or decode_head.num_queries."
            )
        logits, inside = (part.to(memory) for part in proposals(sizes))
        encoded = self.enc_output_norm(self.enc_output(memory * inside))
        index = self.best(self.class_embed(encoded).amax(-1))[:, :, None]
        queries = encoded.gather(1, index.expand(-1, -1, encoded.shape[-1]))
        if self.maskdino.initialize_box_type == "no":
            boxes = logits.expand(batch, -1, -1).gather(1, index.expand(-1, -1, 4))
            boxes = (self._bbox_embed(queries) + boxes).sigmoid()
        else:
            exclusive = self.maskdino.initialize_box_type == "bitmask"
            boxes = boxes_of(self.predict(queries, features)[1], exclusive=exclusive)
            boxes = inverse_sigmoid(boxes).sigmoid()
        if self.maskdino.learn_tgt:
            queries = self.query_feat.weight.expand(batch, -1, -1)
        return queries, boxes

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As `QueryHead.forward`, and boxes ``(B, Q, 4)`` x, y, w, h, shares of the input."""
        features, memories = self.pixel_decoder(outputs)
        # Tokens go in the reverse of the encoder's order.
        projections = zip(memories, self.decoder_input_projs, strict=True)
        maps = [project(memory) for memory, project in projections][::-1]
        sizes = tuple((level.shape[2], level.shape[3]) for level in maps)
        memory = torch.cat([to_tokens(level) for level in maps], dim=1)
        queries, boxes = self.begin(memory, sizes, features)
        before = boxes
        for layer in cast(Iterable[DecoderLayer], self.decoder["layers"]):
            before = boxes
            places = self.decoder["ref_point_head"](encode_boxes(boxes))
            queries = layer(queries, places, boxes, memory, sizes)
            boxes = (self._bbox_embed(queries) + inverse_sigmoid(boxes)).sigmoid()
        # The norm is applied twice, here and by `predict`: the published code does it so. And the
        # boxes of its answer are of normed queries, not those that a further layer would get.
        normal = self.decoder_norm(queries)
        boxes = (self._bbox_embed(normal) + inverse_sigmoid(before)).sigmoid()
        return *self.predict(normal, features), boxes
