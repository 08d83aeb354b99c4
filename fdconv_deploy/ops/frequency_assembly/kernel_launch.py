"""Launches of the two assembly kernels for a layer's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fdconv_deploy.ops.frequency_assembly.launch import (
    KernelSpectrum,
    Transform,
    column_transform,
    root_table,
    transform_of,
)
from fdconv_deploy.ops.launch import THREADS_PER_WARP, KernelLaunch, warps_for

if TYPE_CHECKING:  # it imports torch, which compiling kernels does without
    from fdconv_deploy.folding.layer import FoldedConv

F32 = "*fp32"
DENSE_BLOCK = 32
# Two for each of the 132 multiprocessors of an H200, roughly.
PROGRAMS = 256


@dataclass(frozen=True)
class AssemblySizes:
    """Everything of a layer that its kernels are specialised to.

    heads: of the attention matrix, whose columns are the kernel attentions, then filter,
    spatial and channel gates from filter_at, spatial_at and channel_at on (-1: not there, or
    not applied to the kernel). taps: of the local attention, 0 without. scaled: by a
    following BatchNorm. tiles, width, planes: of the `KernelSpectrum`; wide_groups: more than
    256 attentions.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, int]
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
        """As a flat list, for a PyTorch operator's schema."""
        given = asdict(self) | dict(
            zip(("kernel_height", "kernel_width"), self.kernel_size, strict=True)
        )
        return [int(given[name]) for name in _NUMBERS]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> AssemblySizes:
        """What `numbers` gave."""
        fields = dict(zip(_NUMBERS, numbers, strict=True))
        size = fields.pop("kernel_height"), fields.pop("kernel_width")
        flags = {name: bool(fields.pop(name)) for name in ("scaled", "wide_groups")}
        return cls(kernel_size=size, **fields, **flags)  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """R."""
        return self.out_channels * self.kernel_size[0]

    @property
    def columns(self) -> int:
        """C."""
        return self.in_channels * self.kernel_size[1]


_NUMBERS = (
    "out_channels in_channels kernel_height kernel_width heads filter_at spatial_at channel_at "
    "taps scaled planes tiles width wide_groups"
).split()


def assembly_sizes(folded: FoldedConv, spectrum: KernelSpectrum) -> AssemblySizes:
    """Of a dynamic layer."""
    gates = folded.modulation
    after_kernel, after_filter = gates.kernel, gates.kernel + gates.filter
    on_kernel = folded.filter_side == "kernel"
    tiles, planes, _, _, width = spectrum.values.shape
    return AssemblySizes(
        folded.out_channels,
        folded.in_channels,
        folded.kernel_size,
        heads=len(gates.heads),
        filter_at=after_kernel if gates.filter and on_kernel else -1,
        spatial_at=after_filter if gates.spatial else -1,
        channel_at=(
            after_filter + gates.spatial
            if gates.channel and folded.channel_side == "kernel"
            else -1
        ),
        taps=0 if folded.local is None else folded.local.taps,
        scaled=folded.output_scale is not None and on_kernel,
        planes=planes,
        tiles=tiles,
        width=width,
        wide_groups=spectrum.groups.itemsize > 1,
    )


def _of_transform(transform: Transform) -> dict[str, int]:
    return {"odd": transform.odd, "power": transform.power, "limit": transform.limit}


def row_pairs(sizes: AssemblySizes) -> int:
    """Pairs of rows per program of the second kernel.

    One pair already makes full 32-byte sectors of what the first kernel writes, more make
    longer stretches. So: as many as leave two programs to each multiprocessor of a large GPU,
    and no fewer than give a warp work.
    """
    transform = column_transform(sizes.columns, sizes.kernel_size[1])
    if transform is None:
        return 4
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


def row_launch(sizes: AssemblySizes) -> KernelLaunch:
    """Of the first kernel."""
    groups = "*i32" if sizes.wide_groups else "*u8"
    arguments = ("gates", F32), ("values", F32), ("groups", groups), ("table", F32), ("half", F32)
    transform = transform_of(sizes.rows)
    row_blocks, _, _, row_block = half_shape(sizes)
    common = {
        "heads": sizes.heads,
        "planes": sizes.planes,
        "width": sizes.width,
        "row_block": row_block,
        "row_blocks": row_blocks,
        "table_size": root_table(sizes.rows, transform).shape[1],
    }
    if transform is None:
        constants = common | {"rows": sizes.rows, "block": DENSE_BLOCK}
        blocks = sizes.tiles, -(-sizes.rows // DENSE_BLOCK)
        return KernelLaunch("dense_row_kernel", arguments, 1, constants, blocks, 4)
    constants = common | _of_transform(transform)
    warps = warps_for(transform.block * sizes.width, most=16)
    return KernelLaunch("row_kernel", arguments, 1, constants, (sizes.tiles, 1), warps)


def column_launch(
    sizes: AssemblySizes, *, channels_last: bool = False, dtype: str = "float32"
) -> KernelLaunch:
    """Of the second kernel, for weights of a layout and type (float32, float16, bfloat16)."""
    names = "half", "gates", "table", "average", "local_weight", "output_scale", "weight"
    arguments = tuple((name, F32) for name in names)
    height, width = sizes.kernel_size
    transform = column_transform(sizes.columns, width)
    rows = transform_of(sizes.rows)
    row_blocks, _, stored_columns, row_block = half_shape(sizes)
    constants: dict[str, int | bool] = {
        "heads": sizes.heads,
        "table_size": root_table(sizes.columns, transform).shape[1],
        "stored_columns": stored_columns,
        "row_odd": 1 if rows is None else rows.odd,
        "row_power": sizes.rows if rows is None else rows.power,
        "out_channels": sizes.out_channels,
        "in_channels": sizes.in_channels,
        "kernel_height": height,
        "kernel_width": width,
        "taps": sizes.taps,
        "filter_at": sizes.filter_at,
        "spatial_at": sizes.spatial_at,
        "channel_at": sizes.channel_at,
        "scaled": sizes.scaled,
        "channels_last": channels_last,
    }
    if transform is None:
        constants |= {"row_block": row_block, "channel_block": DENSE_BLOCK}
        blocks = row_blocks, -(-sizes.in_channels // DENSE_BLOCK) * width
        launch = KernelLaunch("dense_column_kernel", arguments, 1, constants, blocks, 4)
        return launch.typed(weight=dtype)
    constants |= _of_transform(transform) | {"pairs": row_block // 2}
    warps = warps_for(transform.block * row_block // 2, most=16)
    launch = KernelLaunch("column_kernel", arguments, 1, constants, (row_blocks, 1), warps)
    return launch.typed(weight=dtype)
