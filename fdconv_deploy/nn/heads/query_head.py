"""What Mask2Former and MaskDINO have in common: decisions, pixel decoder, queries' scores.

By mmdetection's parameter names. A decision is a module whose answer is a step, so that rounding
can change it: what comes behind it may be far off though nothing is wrong. An export is therefore
judged between them, on the network's own decisions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import MaskDINOHeadConfig, QueryHeadConfig
from fdconv_deploy.nn.heads.decode_heads import resize
from fdconv_deploy.nn.spectrum import FrequencyOrder
from fdconv_deploy.nn.transformer import (
    MultiScaleDeformableAttention,
    Size,
    cell_centres,
    feed_forward,
    sine_encoding,
    to_map,
    to_tokens,
)


class Decision(nn.Module):
    """A step function of one tensor, which one node of a graph computes.

    Attributes:
        operator: ONNX's name of that node, whose first input is the tensor.
        constant: the node's second input, by which it is known; None where the operator tells
            enough.
    """

    operator: ClassVar[str]
    constant: np.float32 | None = None


class Below(Decision):
    """Whether values are below a threshold: 1 where they are, else 0, of the input's type."""

    operator = "Less"

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold, self.constant = threshold, np.float32(threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return (x < self.threshold).to(x.dtype)


class Best(Decision):
    """The places of the ``count`` highest of axis 1, the highest first."""

    operator = "TopK"

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N)`` -> ``(B, count)`` int64."""
        return torch.topk(x, self.count, dim=1).indices


def decisions(network: nn.Module) -> dict[str, Decision]:
    """A network's decisions by name."""
    return {n: module for n, module in network.named_modules() if isinstance(module, Decision)}


def _normed(conv: nn.Conv2d, groups: int) -> nn.Sequential:
    """A convolution and GroupNorm by mmcv's names."""
    return nn.Sequential(OrderedDict(conv=conv, gn=nn.GroupNorm(groups, conv.out_channels)))


class EncoderLayer(nn.Module):
    """Deformable attention among all levels' places, and a feed-forward network."""

    def __init__(self, config: QueryHeadConfig, levels: int, order: FrequencyOrder) -> None:
        super().__init__()
        channels = config.channels
        self.self_attn = MultiScaleDeformableAttention(
            channels, config.encoder_heads, levels, config.encoder_points
        )
        self.ffn = feed_forward(channels, config.encoder_feedforward, nn.ReLU(), config.conv, order)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, x: Tensor, places: Tensor, sizes: tuple[Size, ...]) -> Tensor:
        """``x``: ``(B, places, C)``; ``places``: their encoding, which values do not hold."""
        centres = cell_centres(sizes).to(x)
        x = self.norms[0](x + self.self_attn(x + places, x, sizes, centres))
        return self.norms[1](x + self.ffn(x))


class PixelDecoder(nn.Module):
    """The backbone's outputs -> features for masks, and the maps that queries attend to.

    Levels go from low resolution to high, but in MaskDINO's order ``"low2high"``.
    """

    def __init__(self, config: QueryHeadConfig, order: FrequencyOrder) -> None:
        super().__init__()
        self.config = config
        channels, groups = config.channels, config.norm_groups
        self.extra, self.ascending = 0, False
        if isinstance(config, MaskDINOHeadConfig):
            self.extra, self.ascending = config.extra_levels, config.feature_order == "low2high"
        # Further levels' layers come last in either order.
        self.inputs = list(config.levels) if self.ascending else list(config.levels)[::-1]
        widths = [config.in_channels[level] for level in self.inputs]
        convs = [nn.Conv2d(width, channels, 1) for width in widths]
        width = config.in_channels[-1]
        for _ in range(self.extra):
            convs.append(nn.Conv2d(width, channels, 3, 2, 1))
            width = channels
        self.input_convs = nn.ModuleList(_normed(conv, groups) for conv in convs)
        encoder = [EncoderLayer(config, len(convs), order) for _ in range(config.encoder_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(encoder)})
        self.level_encoding = nn.Embedding(len(convs), channels)
        lateral = nn.Conv2d(config.in_channels[0], channels, 1, bias=False)
        output = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.lateral_convs = nn.ModuleList([_normed(lateral, groups)])
        self.output_convs = nn.ModuleList([_normed(output, groups)])
        self.mask_feature = nn.Conv2d(channels, config.mask_channels, 1)

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The backbone's outputs, finest first, to mask features and a map for each level.

        ``(B, M, h, w)`` at the finest output's size; ``(B, C, h, w)`` each, in the encoder's order.
        """
        maps = [outputs[self.config.in_index[place]] for place in range(4)]
        convs = list(self.input_convs)
        levels = [conv(maps[place]) for conv, place in zip(convs, self.inputs, strict=False)]
        coarsest = maps[-1]
        for conv in convs[len(levels) :]:
            coarsest = conv(coarsest)
            levels.insert(len(levels) if self.ascending else 0, coarsest)
        sizes = tuple((level.shape[2], level.shape[3]) for level in levels)
        tokens = torch.cat([to_tokens(level) for level in levels], dim=1)
        places = torch.cat(
            [
                sine_encoding(size, self.config.channels, tokens) + embedding
                for size, embedding in zip(sizes, self.level_encoding.weight, strict=True)
            ],
            dim=1,
        )
        for layer in cast(Iterable[EncoderLayer], self.encoder["layers"]):
            tokens = layer(tokens, places, sizes)
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        memories = [to_map(part, size) for part, size in zip(parts, sizes, strict=True)]
        finest = memories[0 if self.ascending else -1]
        mixed = self.lateral_convs[0](maps[0]) + resize(finest, maps[0].shape[-2:], False)
        return self.mask_feature(F.relu(self.output_convs[0](mixed))), memories


class QueryHead(nn.Module):
    """The backbone's outputs -> class logits ``(B, Q, classes)``, mask logits ``(B, Q, h, w)``.

    MaskDINO's gives boxes as well.
    """

    def __init__(self, config: QueryHeadConfig, order: FrequencyOrder) -> None:
        super().__init__()
        self.config = config
        self.pixel_decoder = PixelDecoder(config, order)

    def _input_projections(self, levels: int) -> nn.ModuleList:
        """What brings the pixel decoder's maps to the decoder's width."""
        config = self.config
        return nn.ModuleList(
            nn.Conv2d(config.channels, config.hidden_channels, 1)
            if config.input_projection
            else nn.Identity()
            for _ in range(levels)
        )

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``outputs``: the backbone's, each ``(B, C, h, w)``, finest first."""
        raise NotImplementedError

    def class_scores(self, classes: Tensor) -> Tensor:
        """Scores ``(B, Q, num_classes)`` of class logits ``(B, Q, class_outputs)``."""
        return classes.softmax(-1)[..., :-1]

    def semantic_scores(self, classes: Tensor, masks: Tensor, size: Sequence[int]) -> Tensor:
        """Scores ``(B, num_classes, H, W)``: sums over queries, so they may exceed 1.

        Masks are resized to ``size``, the network's input's, before they become probabilities.
        """
        probabilities = resize(masks, size, False).sigmoid()
        scores = self.class_scores(classes).transpose(1, 2) @ probabilities.flatten(2)
        return scores.unflatten(2, tuple(size))
