"""Constants and launches of the GPU kernels of a layer: numpy, no Triton, no torch.

The kernels invert the spectrum as the published code does, rows of the kernel matrix first,
then its columns onto real numbers; a folded spectrum is stored the other way round (half of
the rows). This way round a kernel's rows come out whole, so the modulation finds all of an
output channel's weights in one program; and no row whose two mirror images are weighed by
different attentions needs a second slot, see `unfold_spectrum`.

Sizes: R rows, C columns, P planes. A tile is ``tile_columns`` columns of the C/2 + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.ops.attention.launch import (
    ATTENTION,
    PARTS,
    GateSizes,
    Pooling,
    gate_constants,
)
from fdconv_deploy.ops.launch import (
    THREADS_PER_WARP,
    KernelLaunch,
    constants_of,
    make_launch,
    power_of_two,
    warps_for,
)

if TYPE_CHECKING:  # it imports torch, which compiling kernels does without
    from fdconv_deploy.folding.layer import FoldedConv

DENSE_BLOCK = 32
# Two for each of the 132 multiprocessors of an H200, roughly.
PROGRAMS = 256
# Of 132 multiprocessors.
SCHEDULERS = 528
# Points of a transform that has few warps to itself.
SHORT = 512
# Above this the odd part of a length would not fit a thread's registers.
LARGEST_ODD = 27


def pass_radix(length: int, limit: int) -> int:
    """Radix of the first pass over ``length`` (a power of two), none above ``limit``."""
    bits, most = length.bit_length() - 1, limit.bit_length() - 1
    return int(2 ** -(-bits // max(1, -(-bits // most))))


@dataclass(frozen=True)
class Transform:
    """How one length is inverted: ``length = odd · power`` in registers, or a dense product.

    odd: 1, 3, … `LARGEST_ODD`; power: of two; limit: on a pass's radix.
    """

    length: int
    odd: int
    power: int
    limit: int

    @property
    def block(self) -> int:
        """Points of one transform in each of a pass's tensors."""
        return self.power // pass_radix(self.power, self.limit)

    def outputs(self, warps: int) -> int:
        """Outputs of the odd part that one program computes, one after another.

        All of a program's inputs go into each. So programs share them, up to four, only where all
        their ``warps`` leave some of a large GPU's schedulers without any.
        """
        if warps > SCHEDULERS:
            return self.odd
        return min(n for n in range(1, self.odd + 1) if self.odd % n == 0 and self.odd // n <= 4)


def transform_of(length: int) -> Transform | None:
    """How a length is inverted; None for a dense product, where its odd part is too large."""
    power = length & -length
    odd = length // power
    if odd > LARGEST_ODD:
        return None
    # One output of the odd part is transformed while all its inputs stay in registers: about
    # 40 complex numbers a thread leave room to work with. Short transforms are waited for, not
    # worked on: a small radix spreads them over more warps.
    limit = 4 if length <= SHORT else 8
    while limit > 2 and odd * limit > 40:
        limit //= 2
    return Transform(length, odd, power, limit)


def column_transform(columns: int, kernel_width: int) -> Transform | None:
    """Of C points; None for a dense product."""
    transform = transform_of(columns)
    # So that each output of the odd part is of one kernel column.
    return None if transform is None or transform.odd % kernel_width else transform


def _roots(turns: NDArray[np.int64], length: int) -> NDArray[np.complex128]:
    """exp(2πi · turns / length), the turns reduced in integers so that angles stay exact."""
    return np.exp(2j * np.pi * (turns % length) / length).reshape(-1)


@lru_cache(maxsize=128)
def root_table(length: int, transform: Transform | None) -> NDArray[np.float32]:
    """Roots of unity that a transform reads: ``(2, n)`` float32, real and imaginary parts.

    Of the odd part, if above 1: its ``odd`` roots, then ``(odd, power)`` twiddles. Then of each
    pass but the last the first power, ``(points left,)``. At least four, in fours.
    """
    parts = []
    if transform is None:
        parts.append(_roots(np.arange(length), length))
    else:
        odd, left = transform.odd, transform.power
        if odd > 1:
            parts.append(_roots(np.arange(odd), odd))
            parts.append(_roots(np.arange(odd)[:, None] * np.arange(left), length))
        while (radix := pass_radix(left, transform.limit)) < left:
            parts.append(_roots(np.arange(left // radix), left))
            left //= radix
    table = np.concatenate([*parts, np.ones(0)])
    table = np.pad(table, (0, -len(table) % 4 if len(table) else 4))
    return np.stack([table.real, table.imag]).astype(np.float32)


def tile_columns(rows: int, stored: int) -> int:
    """Columns per program of the row kernel, of C/2 + 1 ``stored`` ones."""
    transform = transform_of(rows)
    if transform is None:
        return 4
    # Two where four leave multiprocessors of a large GPU idle: with the rows that the second kernel
    # takes together they still make full 32-byte sectors. Short columns need more to fill a warp.
    width = 4 if stored > 4 * 128 else 2
    return max(width, 32 // transform.block)


@dataclass(frozen=True)
class KernelSpectrum:
    """A spectrum laid out for the kernels: what one program reads lies together.

    values: ``(tiles, P, 2, R, tile_columns)`` float32, real and imaginary parts.
    groups: ``(tiles, P, R, tile_columns)`` uint8, or int32 for more than 256 attentions.
    Columns past C/2 hold zeros.
    """

    values: NDArray[np.float32]
    groups: NDArray[np.uint8] | NDArray[np.int32]


def kernel_spectrum(values: NDArray[np.complex64], groups: NDArray[np.int64]) -> KernelSpectrum:
    """Lay a layer's spectra out for the kernels, as `unfold_spectrum` gives them."""
    ratio, rows, used = values.shape
    width = tile_columns(rows, used)
    tiles = -(-used // width)
    spare = ((0, 0), (0, 0), (0, tiles * width - used))

    def tiled(array: NDArray) -> NDArray:  # (P, R, columns) -> (tiles, P, R, width)
        return np.pad(array, spare).reshape(ratio, rows, tiles, width).transpose(2, 0, 1, 3)

    parts = np.stack([tiled(values.real), tiled(values.imag)], axis=2)
    compact = tiled(groups).astype(np.uint8 if groups.max(initial=0) <= 255 else np.int32)
    return KernelSpectrum(np.ascontiguousarray(parts), np.ascontiguousarray(compact))


@dataclass(frozen=True)
class AssemblySizes:
    """Everything of a layer that its kernels are specialised to.

    heads: columns of the attention matrix. The kernel attentions come first, then filter, spatial
    and channel gates from filter_at, spatial_at and channel_at on; -1 where there is none, or where
    it is not applied to the kernel. taps: of the local attention, 0 without one. scaled: by a
    following BatchNorm. planes, tiles, width: of the `KernelSpectrum`; wide_groups: more than 256
    attentions.
    """

    out_channels: int
    in_channels: int
    kernel_height: int
    kernel_width: int
    heads: int
    filter_at: int
    spatial_at: int
    channel_at: int
    taps: int
    scaled: bool
    planes: int
    tiles: int
    width: int
    wide_groups: bool

    def numbers(self) -> list[int]:
        """The fields in order, as integers, for a PyTorch operator's schema or a plugin's field."""
        return [int(number) for number in astuple(self)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> AssemblySizes:
        """The sizes that `numbers` lists."""
        kinds = [bool if field.type == "bool" else int for field in fields(cls)]
        typed = (kind(number) for kind, number in zip(kinds, numbers, strict=True))
        return cls(*typed)  # type: ignore[arg-type]

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Height and width of a kernel."""
        return self.kernel_height, self.kernel_width

    @property
    def rows(self) -> int:
        """Rows of the kernel matrix, R = out_channels * kernel_height."""
        return self.out_channels * self.kernel_height

    @property
    def columns(self) -> int:
        """Columns of the kernel matrix, C = in_channels * kernel_width."""
        return self.in_channels * self.kernel_width

    @property
    def group_type(self) -> str:
        """Type of the spectrum's groups."""
        return "int32" if self.wide_groups else "uint8"


def gate_offsets(folded: FoldedConv) -> dict[str, int]:
    """``heads`` and the gates' offsets of a dynamic layer, as `AssemblySizes` names them."""
    gates = folded.modulation
    after_kernel, after_filter = gates.kernel, gates.kernel + gates.filter
    filters = gates.filter and folded.filter_side == "kernel"
    channels = gates.channel and folded.channel_side == "kernel"
    return {
        "heads": len(gates.heads),
        "filter_at": after_kernel if filters else -1,
        "spatial_at": after_filter if gates.spatial else -1,
        "channel_at": after_filter + gates.spatial if channels else -1,
    }


def assembly_sizes(folded: FoldedConv, spectrum: KernelSpectrum) -> AssemblySizes:
    """The sizes of a dynamic layer whose spectrum was laid out for the kernels."""
    tiles, planes, _, _, width = spectrum.values.shape
    return AssemblySizes(
        folded.out_channels,
        folded.in_channels,
        *folded.kernel_size,
        **gate_offsets(folded),
        taps=0 if folded.local is None else folded.local.taps,
        scaled=folded.output_scale is not None and folded.filter_side == "kernel",
        planes=planes,
        tiles=tiles,
        width=width,
        wide_groups=spectrum.groups.itemsize > 1,
    )


def _of_transform(transform: Transform, warps: int) -> dict[str, Any]:
    return constants_of(transform, "odd power limit") | {"outputs": transform.outputs(warps)}


def row_pairs(sizes: AssemblySizes) -> int:
    """Pairs of rows per program of the second kernel."""
    transform = column_transform(sizes.columns, sizes.kernel_width)
    if transform is None:
        return 4
    # One makes full 32-byte sectors of what the first kernel writes, more make longer stretches: as
    # many as leave each multiprocessor of a large GPU two programs, no fewer than give a warp work.
    pairs = 1
    while pairs < 4 and -(-sizes.rows // (4 * pairs)) >= PROGRAMS:
        pairs *= 2
    while pairs * transform.block < THREADS_PER_WARP and 2 * pairs < sizes.rows:
        pairs *= 2
    return pairs


def half_shape(sizes: AssemblySizes) -> tuple[int, int, int, int]:
    """Of what the first kernel gives the second, per image: ``(row blocks, 2, columns, rows)``."""
    block = 2 * row_pairs(sizes)
    return -(-sizes.rows // block), 2, sizes.tiles * sizes.width, block


@lru_cache(maxsize=2048)
def row_launch(sizes: AssemblySizes) -> KernelLaunch:
    """The launch of the row kernel, which runs first."""
    pointers, types = "gates values groups table half", {"groups": sizes.group_type}
    transform = transform_of(sizes.rows)
    row_blocks, _, _, row_block = half_shape(sizes)
    constants = {
        **constants_of(sizes, "heads planes rows width"),
        "row_block": row_block,
        "row_blocks": row_blocks,
        "table_size": root_table(sizes.rows, transform).shape[1],
    }
    if transform is None:
        constants["block"] = DENSE_BLOCK
        blocks = sizes.tiles, -(-sizes.rows // DENSE_BLOCK)
        return make_launch("dense_row_kernel", pointers, types, constants, blocks, 4)
    warps = warps_for(transform.block * sizes.width, most=16)
    constants |= _of_transform(transform, sizes.tiles * warps)
    blocks = sizes.tiles, transform.odd // constants["outputs"]
    return make_launch("row_kernel", pointers, types, constants, blocks, warps)


# Of a tile, numbers to a thread: of heads, and of the pooled parts that are added up.
HEADS_A_THREAD, PARTS_A_THREAD = 32, 16


@lru_cache(maxsize=2048)
def attend_rows_launch(
    pooling: Pooling, gates: GateSizes, kernel: int, sizes: AssemblySizes
) -> KernelLaunch | None:
    """The launch of the row kernel that takes the pooled input and makes the gates.

    None where a kernel of its own has to make them: softmax needs all at once, and very wide layers
    have more heads, or parts of the hidden layer, than every program should go through. kernel:
    attentions that weigh the spectrum.
    """
    rows = row_launch(sizes)
    # The hidden layer takes a warp longer than its part of a short transform: where there are
    # schedulers without any, a program has more.
    tiles, programs = rows.blocks
    warps = max(4 if tiles * programs * rows.warps < SCHEDULERS else 1, rows.warps)
    threads, kernel_pad = warps * THREADS_PER_WARP, power_of_two(kernel)
    most = PARTS_A_THREAD * threads
    constants = rows.constants | gate_constants(pooling, gates, averages=most, parts=most)
    fits = kernel_pad * constants["unit_pad"] <= HEADS_A_THREAD * threads
    if not (fits and gates.sigmoid and rows.kernel == "row_kernel"):
        return None
    if pooling.parts * pooling.units > PARTS:
        return None
    del constants["heads"]
    each = -(-(gates.count - kernel) // (tiles * programs))
    constants |= {
        "kernel": kernel, "kernel_pad": kernel_pad, "each": each, "each_pad": power_of_two(each),
        "tiles": tiles,
    }  # fmt: skip
    pointers = f"{ATTENTION} values groups table average gates half"
    types = {"groups": sizes.group_type}
    blocks = tiles + gates.averaged, programs
    return make_launch("attend_rows_kernel", pointers, types, constants, blocks, warps)


@lru_cache(maxsize=2048)
def column_launch(
    sizes: AssemblySizes, *, channels_last: bool = False, dtype: str = "float32"
) -> KernelLaunch:
    """The launch of the column kernel, for weights of a layout and a type of `TYPES`."""
    pointers, types = "half gates table average local_weight output_scale weight", {"weight": dtype}
    width = sizes.kernel_width
    transform = column_transform(sizes.columns, width)
    rows = transform_of(sizes.rows)
    row_blocks, _, stored_columns, row_block = half_shape(sizes)
    names = (
        "heads rows in_channels kernel_height kernel_width taps scaled "
        "filter_at spatial_at channel_at"
    )
    constants = constants_of(sizes, names) | {
        "table_size": root_table(sizes.columns, transform).shape[1],
        "stored_columns": stored_columns,
        "row_odd": 1 if rows is None else rows.odd,
        "row_power": sizes.rows if rows is None else rows.power,
        "channels_last": channels_last,
    }
    if transform is None:
        constants |= {"row_block": row_block, "channel_block": DENSE_BLOCK}
        blocks = row_blocks, -(-sizes.in_channels // DENSE_BLOCK) * width
        return make_launch("dense_column_kernel", pointers, types, constants, blocks, 4)
    warps = warps_for(transform.block * row_block // 2, most=16)
    constants |= _of_transform(transform, row_blocks * warps) | {"pairs": row_block // 2}
    blocks = row_blocks, transform.odd // constants["outputs"]
    return make_launch("column_kernel", pointers, types, constants, blocks, warps)
