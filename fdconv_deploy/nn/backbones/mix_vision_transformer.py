"""SegFormer's backbone (MiT), its feed-forward networks' 1×1 convolutions FDConv or plain."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import MixVisionTransformerConfig
from fdconv_deploy.nn.fdconv import conv_or_fdconv
from fdconv_deploy.nn.spectrum import FrequencyOrder
from fdconv_deploy.nn.transformer import (
    PatchEmbedding,
    heads_apart,
    heads_together,
    to_map,
    to_tokens,
    weigh,
)

# Of every LayerNorm, where mmsegmentation's other backbones have 1e-5.
EPSILON = 1e-6


class EfficientAttention(nn.Module):
    """Attention whose keys and values are of a map shrunk ``ratio`` times.

    Rows and columns left over by the shrinking are dropped.
    """

    def __init__(self, channels: int, heads: int, ratio: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.ratio = heads, ratio
        self.attn = nn.MultiheadAttention(channels, heads, bias=bias)  # holds the weights
        if ratio > 1:
            self.sr = nn.Conv2d(channels, channels, ratio, ratio)
            self.norm = nn.LayerNorm(channels, EPSILON)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``x``: ``(B, H·W, C)``."""
        source = x
        if self.ratio > 1:
            source = self.norm(to_tokens(self.sr(to_map(x, size))))
        channels = x.shape[-1]
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        query = F.linear(x, weight[:channels], None if bias is None else bias[:channels])
        others = F.linear(source, weight[channels:], None if bias is None else bias[channels:])
        key, value = others.split(channels, -1)
        q, k, v = (heads_apart(part, self.heads) for part in (query, key, value))
        out = self.attn.out_proj
        return F.linear(heads_together(weigh(q, k, v)), out.weight, out.bias)


class MixFeedForward(nn.Module):
    """1×1, depthwise 3×3, GELU, 1×1; nothing between the first two."""

    def __init__(self, config: MixVisionTransformerConfig, channels: int, order: FrequencyOrder):
        super().__init__()
        hidden = channels * config.mlp_ratio
        self.layers = nn.Sequential(
            conv_or_fdconv(config.conv, channels, hidden, order=order),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden),
            nn.GELU(),
            nn.Identity(),  # dropout; the next one's name depends on it
            conv_or_fdconv(config.conv, hidden, channels, order=order),
        )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``x``: ``(B, H·W, C)``."""
        return to_tokens(self.layers(to_map(x, size)))


class Block(nn.Module):
    """Attention and feed-forward network, each of the normalised tokens and added to them."""

    def __init__(self, config: MixVisionTransformerConfig, stage: int, order: FrequencyOrder):
        super().__init__()
        channels = config.widths[stage]
        self.norm1 = nn.LayerNorm(channels, EPSILON)
        self.attn = EfficientAttention(
            channels, config.num_heads[stage], config.sr_ratios[stage], config.qkv_bias
        )
        self.norm2 = nn.LayerNorm(channels, EPSILON)
        self.ffn = MixFeedForward(config, channels, order)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``x``: ``(B, H·W, C)``."""
        x = x + self.attn(self.norm1(x), size)
        return x + self.ffn(self.norm2(x), size)


class MixVisionTransformer(nn.Module):
    """``(B, in_channels, H, W)`` -> one feature map per entry of ``config.out_indices``."""

    def __init__(self, config: MixVisionTransformerConfig, order: FrequencyOrder = "torch") -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        channels = config.in_channels
        for stage, width in enumerate(config.widths):
            size, stride = config.patch_sizes[stage], config.strides[stage]
            embedding = PatchEmbedding(
                channels, width, size, stride, padding=size // 2, epsilon=EPSILON
            )
            blocks = [Block(config, stage, order) for _ in range(config.num_layers[stage])]
            norm = nn.LayerNorm(width, EPSILON)
            self.layers.append(nn.ModuleList([embedding, nn.ModuleList(blocks), norm]))
            channels = width

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x``: ``(B, in_channels, H, W)`` float32."""
        features = []
        for index, stage in enumerate(self.layers):
            embedding, blocks, norm = cast(nn.ModuleList, stage)
            tokens, size = embedding(x)
            for block in cast(nn.ModuleList, blocks):
                tokens = block(tokens, size)
            x = to_map(norm(tokens), size)
            if index in self.config.out_indices:
                features.append(x)
        return tuple(features)
