"""Launches of the band modulation's kernels for a layer's sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fdconv_deploy.ops.launch import FLOAT_TYPES, KernelLaunch, power_of_two, warps_for

F32 = "*fp32"
TILE = 1024
TALLEST = 128


def combination_launch(
    *,
    channels: int,
    pixels: int,
    groups: int,
    weighted: int,
    terms: int,
    sigmoid: bool,
    channels_last: bool = False,
    dtype: str = "float32",
) -> KernelLaunch:
    """For ``channels`` × ``pixels`` inputs of a type (float32, float16, bfloat16).

    groups, weighted, terms: of `FoldedBands`. sigmoid: whether the kernel applies it; a
    softmax has been applied already.
    """
    # The axis that is contiguous gets the longer side of the tile.
    limit = power_of_two(channels if channels_last else pixels)
    longer = min(TALLEST, limit)
    limit = power_of_two(pixels if channels_last else channels)
    shorter = min(TILE // longer, limit)
    pixel_block, channel_block = (shorter, longer) if channels_last else (longer, shorter)
    feature = "*" + FLOAT_TYPES[dtype]
    arguments = (
        ("x", feature),
        ("logits", feature),
        ("mix", F32),
        ("mix_bias", F32),
        ("lows", feature),
        ("y", feature),
    )
    constants: dict[str, int | bool | float] = {
        "channels": channels,
        "pixels": pixels,
        "groups": groups,
        "weighted": weighted,
        "terms": terms,
        "pixel_block": pixel_block,
        "channel_block": channel_block,
        "sigmoid": sigmoid,
        "channels_last": channels_last,
        "dependent": False,
    }
    blocks = -(-pixels // pixel_block), -(-channels // channel_block)
    return KernelLaunch("combination_kernel", arguments, constants, blocks, 4)


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


def project_launch(sizes: BandSizes, channels_last: bool, dtype: str) -> KernelLaunch:
    """Image rows onto the widest band's frequencies."""
    feature = "*" + FLOAT_TYPES[dtype]
    count_block, channel_block = _block(sizes.count, 32), _block(sizes.channels)
    constants: dict[str, int | bool | float | tuple[int, ...]] = {
        "channels": sizes.channels,
        "height": sizes.height,
        "width": sizes.width,
        "count": sizes.count,
        "shares": sizes.shares,
        "channel_block": channel_block,
        "count_block": count_block,
        "pixel_block": _block(sizes.width, 32),
        "share_pad": _block(sizes.shares),
        "channels_last": channels_last,
        "dependent": False,
    }
    blocks = sizes.height * -(-sizes.count // count_block), sizes.channel_blocks
    arguments = (
        ("x", feature),
        ("to_columns", feature),
        ("windows", feature),
        ("given", F32),
        ("projected", feature),
    )
    # Without tensor cores for float16 (7.5), two products in four warps take too many registers.
    warps = 8 if sizes.shares else 4
    return KernelLaunch("project_rows_kernel", arguments, constants, blocks, warps, STAGES)


def filter_launch(sizes: BandSizes, channels_last: bool, dtype: str) -> KernelLaunch:
    """Each band's low-pass along the columns of pixels, and the logits where they are made here."""
    feature = "*" + FLOAT_TYPES[dtype]
    row_block = _block(sizes.rows, 32)
    row_blocks = -(-sizes.rows // row_block)
    column_blocks = sum(-(-kept * sizes.channels // MOST) for kept in sizes.columns)
    parts = sizes.window**2 * sizes.channel_blocks
    pixel_block = max(1, ADDED // power_of_two(parts))
    pixel_blocks = -(-sizes.height * sizes.width // pixel_block) if sizes.maps else 0
    constants: dict[str, int | bool | float | tuple[int, ...]] = {
        "channels": sizes.channels,
        "rows": sizes.rows,
        "count": sizes.count // sizes.parts,
        "columns": sizes.columns,
        "row_block": row_block,
        "column_block": MOST,
        "column_blocks": column_blocks,
        "inner_block": _block(sizes.rows, 32),
        "maps": sizes.maps,
        "parts": parts,
        "height": sizes.height,
        "width": sizes.width,
        "window": sizes.window,
        "part_pad": power_of_two(parts),
        "pixel_block": pixel_block,
        "channels_last": channels_last,
        "dependent": False,
    }
    arguments = (
        ("projected", feature),
        ("through", feature),
        ("given", F32),
        ("logits", feature),
        ("filtered", feature),
    )
    blocks = row_blocks, column_blocks + -(-pixel_blocks // row_blocks)
    return KernelLaunch("filter_columns_kernel", arguments, constants, blocks, 4, STAGES)


def modulate_launch(
    sizes: BandSizes, channels_last: bool, dtype: str, *, biased: bool, sigmoid: bool
) -> KernelLaunch:
    """Back to pixels, weighed and added."""
    feature = "*" + FLOAT_TYPES[dtype]
    pixel_block, channel_block = _block(sizes.width, 32), _block(sizes.channels, 32)
    constants: dict[str, int | bool | float | tuple[int, ...]] = {
        "channels": sizes.channels,
        "height": sizes.height,
        "width": sizes.width,
        "parts": sizes.parts,
        "columns": sizes.columns,
        "groups": sizes.groups,
        "weighted": sizes.weighted,
        "pixel_block": pixel_block,
        "channel_block": channel_block,
        "inner_block": 16,
        "biased": biased,
        "sigmoid": sigmoid,
        "channels_last": channels_last,
        "dependent": False,
    }
    arguments = (
        ("x", feature),
        ("logits", feature),
        ("shift", F32),
        ("mix", F32),
        ("mix_bias", F32),
        ("filtered", feature),
        ("from_columns", feature),
        ("y", feature),
    )
    blocks = sizes.height * -(-sizes.width // pixel_block), -(-sizes.channels // channel_block)
    warps = warps_for(pixel_block * channel_block // 8, most=4)
    return KernelLaunch("modulate_rows_kernel", arguments, constants, blocks, warps, STAGES)
