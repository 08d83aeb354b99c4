"""Swin as mmsegmentation builds it, its feed-forward networks' linear layers FDConv or plain.

Microsoft's segmentation code, and so detectron2's projects, computes the same but for the order
of channels where patches are merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.config import SwinTransformerConfig
from fdconv_deploy.nn.spectrum import FrequencyOrder
from fdconv_deploy.nn.transformer import PatchEmbedding, feed_forward, to_map, weigh

# Added to the logits of tokens that a shifted window does not have side by side in the map.
APART = -100.0


@lru_cache(maxsize=16)
def relative_positions(window: int) -> Tensor:
    """Row of the bias table for each two places of a window, ``(window², window²)`` int64.

    Shared by all blocks: do not write to it.
    """
    y, x = np.divmod(np.arange(window**2), window)
    rows, columns = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return torch.from_numpy((rows + window - 1) * (2 * window - 1) + columns + window - 1)


class Windows:
    """How the tokens of a map are cut into windows of one size, be they shifted or not.

    The map is padded to multiples of the window, however small it is, and rolled by half a
    window if shifted.

    Attributes:
        padded: whether there are places with no token.
        places: ``(windows · window²,)`` int64, the token at each place, window by window; the
            number of tokens where the map was padded.
        back: ``(tokens,)`` int64, the place of each token.
        masks, kinds: what is added to a window's logits is ``masks[kinds[window]]``: ``(n, 1,
            window², window²)`` float32, of which a few differ, and ``(windows,)`` int64. None if
            nothing is added.
    """

    def __init__(self, height: int, width: int, window: int, shifted: bool) -> None:
        rows, columns = (-(-side // window) * window for side in (height, width))
        tokens = np.full((rows, columns), height * width, dtype=np.int64)
        tokens[:height, :width] = np.arange(height * width).reshape(height, width)
        self.padded = rows > height or columns > width
        region = np.zeros((rows, columns), dtype=np.int64)
        if shifted:
            half = window // 2
            tokens = np.roll(tokens, (-half, -half), (0, 1))
            for axis, side in enumerate((rows, columns)):
                place = np.arange(side)
                number = (place >= side - window).astype(np.int64) + (place >= side - half)
                region = region * 3 + (number[:, None] if axis == 0 else number[None, :])

        def cut(array: NDArray[np.int64]) -> NDArray[np.int64]:
            parts = array.reshape(rows // window, window, columns // window, window)
            return parts.transpose(0, 2, 1, 3).reshape(-1, window**2)

        places = cut(tokens).reshape(-1)
        self.places = torch.from_numpy(places)
        self.back = torch.from_numpy(np.argsort(places, kind="stable")[: height * width])
        self.masks: Tensor | None = None
        self.kinds: Tensor | None = None
        if shifted:
            regions, kinds = np.unique(cut(region), axis=0, return_inverse=True)
            apart = regions[:, None, :, None] != regions[:, None, None, :]
            self.masks = torch.from_numpy(np.where(apart, APART, 0.0).astype(np.float32))
            self.kinds = torch.from_numpy(kinds.reshape(-1))


# The tables for one size of map are shared by all blocks.
windows_of = lru_cache(maxsize=64)(Windows)


class WindowAttention(nn.Module):
    """Attention among the tokens of each window, with a learned bias per relative position."""

    relative_position_index: Tensor

    def __init__(self, config: SwinTransformerConfig, stage: int, shifted: bool) -> None:
        super().__init__()
        channels, self.heads = config.widths[stage], config.num_heads[stage]
        self.window, self.shifted = config.window_size, shifted
        table = torch.zeros((2 * self.window - 1) ** 2, self.heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        # Checkpoints hold one for each block.
        self.register_buffer("relative_position_index", relative_positions(self.window).clone())
        self.qkv = nn.Linear(channels, 3 * channels, bias=config.qkv_bias)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``x``: ``(B, H·W, C)``, normalised; places without a token are zeros, as keys too."""
        windows = windows_of(*size, self.window, self.shifted)
        if windows.padded:
            x = F.pad(x, (0, 0, 0, 1))
        x = x.index_select(1, windows.places.to(x.device)).unflatten(1, (-1, self.window**2))
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for part in self.qkv(x).chunk(3, -1)
        )
        places = relative_positions(self.window).to(x.device)
        bias = self.relative_position_bias_table.index_select(0, places.flatten())
        biases = [bias.transpose(0, 1).unflatten(1, places.shape)]
        if windows.masks is not None and windows.kinds is not None:
            # One after the other: their sum would be as large as the logits, a constant per block.
            biases.append(windows.masks.to(x).index_select(0, windows.kinds.to(x.device)))
        x = self.proj(weigh(query, key, value, *biases).transpose(2, 3).flatten(3))
        return x.flatten(1, 2).index_select(1, windows.back.to(x.device))


class Block(nn.Module):
    """Attention and feed-forward network, each of the normalised tokens and added to them."""

    def __init__(
        self, config: SwinTransformerConfig, stage: int, shifted: bool, order: FrequencyOrder
    ) -> None:
        super().__init__()
        channels = config.widths[stage]
        self.norm1 = nn.LayerNorm(channels)
        self.attn = nn.ModuleDict({"w_msa": WindowAttention(config, stage, shifted)})
        self.norm2 = nn.LayerNorm(channels)
        hidden = channels * config.mlp_ratio
        self.ffn = feed_forward(channels, hidden, nn.GELU(), config.conv, order)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``x``: ``(B, H·W, C)``."""
        x = x + self.attn["w_msa"](self.norm1(x), size)
        return x + self.ffn(self.norm2(x))


class PatchMerging(nn.Module):
    """Four tokens become one of twice the channels; a map of odd size is padded with zeros."""

    def __init__(self, channels: int, by_position: bool) -> None:
        super().__init__()
        self.by_position = by_position
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """``(B, H·W, C)`` -> tokens ``(B, ⌈H/2⌉·⌈W/2⌉, 2·C)``, and their map's size."""
        height, width = size
        x = F.pad(x.unflatten(1, size), (0, 0, 0, width % 2, 0, height % 2))
        # (B, row, dy, column, dx, C)
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        order = (0, 1, 3, 4, 2, 5) if self.by_position else (0, 1, 3, 5, 2, 4)
        x = x.permute(order).flatten(3).flatten(1, 2)
        return self.reduction(self.norm(x)), ((height + 1) // 2, (width + 1) // 2)


class SwinTransformer(nn.Module):
    """``(B, in_channels, H, W)`` -> one feature map per entry of ``config.out_indices``."""

    def __init__(self, config: SwinTransformerConfig, order: FrequencyOrder = "torch") -> None:
        super().__init__()
        self.config = config
        size = config.patch_size
        self.patch_embed = PatchEmbedding(config.in_channels, config.embed_dims, size, size)
        self.stages = nn.ModuleList()
        for index, depth in enumerate(config.depths):
            # Windows of every other block are shifted.
            blocks = [Block(config, index, block % 2 == 1, order) for block in range(depth)]
            stage = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
            if index + 1 < len(config.depths):
                stage["downsample"] = PatchMerging(
                    config.widths[index], config.merging == "position"
                )
            self.stages.append(stage)
        for index in sorted(config.out_indices):
            self.add_module(f"norm{index}", nn.LayerNorm(config.widths[index]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x``: ``(B, in_channels, H, W)`` float32."""
        # Padded with zeros to a multiple of the patches' size.
        below, right = (-side % self.config.patch_size for side in x.shape[-2:])
        tokens, size = self.patch_embed(F.pad(x, (0, right, 0, below)))
        features = []
        for index, stage in enumerate(cast(Iterable[nn.ModuleDict], self.stages)):
            for block in cast(nn.ModuleList, stage["blocks"]):
                tokens = block(tokens, size)
            if index in self.config.out_indices:
                features.append(to_map(self.get_submodule(f"norm{index}")(tokens), size))
            if "downsample" in stage:
                tokens, size = stage["downsample"](tokens, size)
        return tuple(features)
