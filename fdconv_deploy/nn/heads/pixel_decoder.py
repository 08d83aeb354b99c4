"""The pixel decoder of Mask2Former and MaskDINO, by mmdetection's parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import FDConvConfig, MaskDINOHeadConfig, QueryHeadConfig
from fdconv_deploy.nn.attention import (
    MultiScaleDeformableAttention,
    Size,
    cell_centres,
    sine_encoding,
)
from fdconv_deploy.nn.fdconv import linear_or_fdconv
from fdconv_deploy.nn.heads.decode_heads import resize
from fdconv_deploy.nn.spectrum import FrequencyOrder


class ConvNorm(nn.Module):
    """A convolution and GroupNorm, ``groups`` of it."""

    def __init__(self, conv: nn.Conv2d, groups: int) -> None:
        super().__init__()
        self.conv = conv
        self.gn = nn.GroupNorm(groups, conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` -> ``(B, O, H', W')``."""
        return self.gn(self.conv(x))


class FeedForward(nn.Module):
    """Linear, ReLU, linear; ``conv`` makes both FDConv."""

    def __init__(
        self, channels: int, hidden: int, conv: FDConvConfig | None, order: FrequencyOrder
    ) -> None:
        super().__init__()
        first = linear_or_fdconv(conv, channels, hidden, order=order)
        second = linear_or_fdconv(conv, hidden, channels, order=order)
        self.layers = nn.Sequential(nn.Sequential(first, nn.ReLU()), second)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, C)`` -> the same shape."""
        return self.layers(x)


class EncoderLayer(nn.Module):
    """Deformable attention among all levels' places, and a feed-forward network."""

    def __init__(self, config: QueryHeadConfig, levels: int, order: FrequencyOrder) -> None:
        super().__init__()
        channels = config.channels
        self.self_attn = MultiScaleDeformableAttention(
            channels, config.encoder_heads, levels, config.encoder_points
        )
        self.ffn = FeedForward(channels, config.encoder_feedforward, config.conv, order)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, x: Tensor, places: Tensor, sizes: tuple[Size, ...]) -> Tensor:
        """``x``: ``(B, places, C)``; ``places``: their encoding, which values do not hold."""
        centres = cell_centres(sizes).to(x)
        x = self.norms[0](x + self.self_attn(x + places, x, sizes, centres))
        return self.norms[1](x + self.ffn(x))


class Encoder(nn.Module):
    """The layers, under the name that checkpoints have for them."""

    def __init__(self, config: QueryHeadConfig, levels: int, order: FrequencyOrder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config, levels, order) for _ in range(config.encoder_layers)
        )


class PixelDecoder(nn.Module):
    """The backbone's outputs -> features for masks, and the maps that queries attend to.

    Levels go from low resolution to high, but in MaskDINO's order ``"low2high"``.
    """

    def __init__(self, config: QueryHeadConfig, frequency_order: FrequencyOrder = "torch") -> None:
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
        self.input_convs = nn.ModuleList(ConvNorm(conv, groups) for conv in convs)
        self.encoder = Encoder(config, len(convs), frequency_order)
        self.level_encoding = nn.Embedding(len(convs), channels)
        lateral = nn.Conv2d(config.in_channels[0], channels, 1, bias=False)
        output = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.lateral_convs = nn.ModuleList([ConvNorm(lateral, groups)])
        self.output_convs = nn.ModuleList([ConvNorm(output, groups)])
        self.mask_feature = nn.Conv2d(channels, config.mask_channels, 1)

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``outputs``: the backbone's, finest first.

        Returns:
            Mask features ``(B, M, h, w)`` at the finest output's size, and a map ``(B, C, h, w)``
            for each level, in the encoder's order.
        """
        maps = [outputs[self.config.in_index[place]] for place in range(4)]
        convs = list(self.input_convs)
        levels = [conv(maps[place]) for conv, place in zip(convs, self.inputs, strict=False)]
        further: list[Tensor] = []
        for conv in convs[len(levels) :]:
            further.append(conv(further[-1] if further else maps[-1]))
        levels = [*levels, *further] if self.ascending else [*further[::-1], *levels]
        sizes = tuple((level.shape[2], level.shape[3]) for level in levels)
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        places = torch.cat(
            [
                sine_encoding(size, self.config.channels, tokens) + embedding
                for size, embedding in zip(sizes, self.level_encoding.weight, strict=True)
            ],
            dim=1,
        )
        for layer in cast(Iterable[EncoderLayer], self.encoder.layers):
            tokens = layer(tokens, places, sizes)
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        memories = [
            part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)
        ]
        finest = memories[0 if self.ascending else -1]
        mixed = self.lateral_convs[0](maps[0]) + resize(finest, maps[0].shape[-2:], False)
        return self.mask_feature(F.relu(self.output_convs[0](mixed))), memories
