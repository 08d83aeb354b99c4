"""Launches of the band modulation's kernels for a layer's sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fdconv_deploy.ops.launch import (
    KernelLaunch,
    constants_of,
    make_launch,
    power_of_two,
    warps_for,
)

TILE = 1024
TALLEST = 128


def combination_launch(
    channels: int,
    pixels: int,
    groups: int,
    weighted: int,
    terms: int,
    *,
    sigmoid: bool,
    channels_last: bool = False,
    dtype: str = "float32",
) -> KernelLaunch:
    """For ``channels`` × ``pixels`` inputs of a type (float32, float16, bfloat16).

    groups, weighted, terms: of `FoldedBands`. sigmoid: whether the kernel applies it; a
    softmax has been applied already.
    """
    # The axis that is contiguous gets the longer side of the tile.
    lengths = (channels, pixels) if channels_last else (pixels, channels)
    longer = min(TALLEST, power_of_two(lengths[0]))
    shorter = min(TILE // longer, power_of_two(lengths[1]))
    pixel_block, channel_block = (shorter, longer) if channels_last else (longer, shorter)
    constants = {
        "channels": channels, "pixels": pixels, "groups": groups, "weighted": weighted,
        "terms": terms, "pixel_block": pixel_block, "channel_block": channel_block,
        "biased": False, "sigmoid": sigmoid, "channels_last": channels_last,
    }  # fmt: skip
    blocks = -(-pixels // pixel_block), -(-channels // channel_block)
    pointers = "x logits mix mix_bias lows y"
    types = dict.fromkeys(("x", "logits", "lows", "y"), dtype)
    return make_launch("combination_kernel", pointers, types, constants, blocks, 4)


@dataclass(frozen=True)
class BandSizes:
    """What the kernels of a layer's band modulation are specialised to.

    count: columns of the projection. parts: 2 where projected rows are complex. columns: how many
    of the projection's columns each band keeps. groups, weighted: of `FoldedBands`. window: side of
    the convolution that makes the logits, which these kernels do; 0 where they are given.
    """

    channels: int
    height: int
    width: int
    count: int
    parts: int
    columns: tuple[int, ...]
    groups: int
    weighted: int
    window: int = 0

    @property
    def maps(self) -> int:
        """Of the logits, where these kernels make them."""
        return self.weighted if self.window else 0

    @property
    def shares(self) -> int:
        """What a pixel gives: to each map under each place of a window."""
        return self.maps * self.window**2

    @property
    def channel_blocks(self) -> int:
        """Programs that share a row's channels in the first kernel."""
        return -(-self.channels // _block(self.channels))

    @property
    def rows(self) -> int:
        """Of the projection, real and imaginary parts each for themselves."""
        return self.height * self.parts

    @property
    def stored(self) -> int:
        """Columns of all bands."""
        return sum(self.columns)


# A product's operands are at least 16 long. Two of its tiles stay in a thread's registers.
LEAST, MOST = 16, 64
STAGES = 3
# Elements that a program of the second kernel adds up for each map.
ADDED = 2048


def takes_convolution(groups: int, maps: int, window: int, softmax: bool) -> bool:
    """Whether the kernels make the logits themselves, of a convolution of one group."""
    return groups == 1 and not softmax and window % 2 == 1 and maps * window**2 <= MOST


def _block(size: int, most: int = MOST) -> int:
    return max(LEAST, min(most, power_of_two(size)))


def _launch(
    kernel: str, pointers: str, constants: dict[str, Any], blocks: tuple[int, int], dtype: str,
    warps: int = 4,
) -> KernelLaunch:  # fmt: skip
    """What has no type of its own is of the features'."""
    features = set(pointers.split()) - {"given", "shift", "mix", "mix_bias"}
    types = dict.fromkeys(features, dtype)
    return make_launch(kernel, pointers, types, constants, blocks, warps, STAGES)


@lru_cache(maxsize=2048)
def project_launch(sizes: BandSizes, channels_last: bool, dtype: str) -> KernelLaunch:
    """Image rows onto the widest band's frequencies."""
    count_block, channel_block = _block(sizes.count, 32), _block(sizes.channels)
    constants = constants_of(sizes, "channels height width count shares") | {
        "channel_block": channel_block, "count_block": count_block,
        "pixel_block": _block(sizes.width, 32), "share_pad": _block(sizes.shares),
        "channels_last": channels_last,
    }  # fmt: skip
    blocks = sizes.height * -(-sizes.count // count_block), sizes.channel_blocks
    # Without tensor cores for float16 (7.5), two products in four warps take too many registers.
    warps = 8 if sizes.shares else 4
    pointers = "x to_columns windows given projected"
    return _launch("project_rows_kernel", pointers, constants, blocks, dtype, warps)


@lru_cache(maxsize=2048)
def filter_launch(sizes: BandSizes, channels_last: bool, dtype: str) -> KernelLaunch:
    """Each band's low-pass along the columns of pixels, and the logits where they are made here."""
    row_block = _block(sizes.rows, 32)
    row_blocks = -(-sizes.rows // row_block)
    column_blocks = sum(-(-kept * sizes.channels // MOST) for kept in sizes.columns)
    parts = sizes.window**2 * sizes.channel_blocks
    pixel_block = max(1, ADDED // power_of_two(parts))
    pixel_blocks = -(-sizes.height * sizes.width // pixel_block) if sizes.maps else 0
    constants = constants_of(sizes, "channels rows columns maps height width window") | {
        "count": sizes.count // sizes.parts, "parts": parts, "part_pad": power_of_two(parts),
        "row_block": row_block, "column_block": MOST, "column_blocks": column_blocks,
        "inner_block": _block(sizes.rows, 32), "pixel_block": pixel_block,
        "channels_last": channels_last,
    }  # fmt: skip
    blocks = row_blocks, column_blocks + -(-pixel_blocks // row_blocks)
    pointers = "projected through given logits filtered"
    return _launch("filter_columns_kernel", pointers, constants, blocks, dtype)


@lru_cache(maxsize=2048)
def modulate_launch(
    sizes: BandSizes, channels_last: bool, dtype: str, *, biased: bool, sigmoid: bool
) -> KernelLaunch:
    """Back to pixels, weighed and added."""
    pixel_block, channel_block = _block(sizes.width, 32), _block(sizes.channels, 32)
    constants = constants_of(sizes, "channels height width parts columns groups weighted") | {
        "terms": len(sizes.columns) + 1, "pixel_block": pixel_block,
        "channel_block": channel_block, "inner_block": 16, "biased": biased, "sigmoid": sigmoid,
        "channels_last": channels_last,
    }  # fmt: skip
    blocks = sizes.height * -(-sizes.width // pixel_block), -(-sizes.channels // channel_block)
    warps = warps_for(pixel_block * channel_block // 8, most=4)
    pointers = "x logits shift mix mix_bias filtered from_columns y"
    return _launch("modulate_rows_kernel", pointers, constants, blocks, dtype, warps)
