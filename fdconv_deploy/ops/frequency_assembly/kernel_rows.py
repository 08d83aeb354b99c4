"""First of the two assembly kernels: spectrum ∘ attention, inverted along the rows.

A program takes one image and one tile of columns, whole. It reads its constants once, in
the order they lie in, and writes what stays in the second-level cache until the second
kernel reads it: for each block of rows that kernel takes together, one stretch of memory.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from fdconv_deploy.ops.frequency_assembly.kernel_transform import odd_output


@triton.jit
def _weighted(gates, values, groups, at, tile_size: tl.constexpr, planes: tl.constexpr):
    """Entries ``at`` of one tile's spectrum, weighed and summed over the planes."""
    real = tl.zeros(at.shape, tl.float32)
    imaginary = tl.zeros(at.shape, tl.float32)
    for plane in tl.static_range(planes):
        gate = tl.load(gates + tl.load(groups + plane * tile_size + at).to(tl.int32))
        real += gate * tl.load(values + 2 * plane * tile_size + at)
        imaginary += gate * tl.load(values + (2 * plane + 1) * tile_size + at)
    return real, imaginary


@triton.jit
def _place(position, column, stored_columns, row_block: tl.constexpr):
    """Where the second kernel looks for a row's entry of a column; real parts."""
    block = position // row_block * (2 * stored_columns)
    return (block + column) * row_block + position % row_block


@triton.jit
def row_kernel(
    gates,  # (B, heads) float32: the kernel attentions first
    values,  # (tiles, planes, 2, R, width) float32
    groups,  # (tiles, planes, R, width) uint8 or int32
    table,  # (2, table_size) float32
    half,  # out: (B, row blocks, 2, tiles · width, row_block) float32
    heads: tl.constexpr,
    planes: tl.constexpr,
    odd: tl.constexpr,
    power: tl.constexpr,
    limit: tl.constexpr,
    width: tl.constexpr,
    row_block: tl.constexpr,
    row_blocks: tl.constexpr,
    table_size: tl.constexpr,
):
    """Lengths R = odd · power. Row odd·c + k is stored at position k·power + c.

    Grid: (B, tiles).
    """
    part: tl.constexpr = power * width
    image = tl.program_id(0)
    tile = tl.program_id(1)
    stored_columns = tl.num_programs(1) * width
    gates += image * heads
    values += tile.to(tl.int64) * (2 * planes * odd * part)
    groups += tile.to(tl.int64) * (planes * odd * part)
    half += image.to(tl.int64) * (row_blocks * row_block * 2) * stored_columns

    lane = tl.arange(0, part)
    xr = ()
    xi = ()
    for t in tl.static_range(odd):
        real, imaginary = _weighted(gates, values, groups, t * part + lane, odd * part, planes)
        xr = xr + (real,)
        xi = xi + (imaginary,)
    for k in range(odd):
        yr, yi = odd_output(xr, xi, k, table, table_size, power, width, limit)
        at = half + _place(
            k * power + lane // width, tile * width + lane % width, stored_columns, row_block
        )
        tl.store(at, yr)
        tl.store(at + stored_columns * row_block, yi)


@triton.jit
def dense_row_kernel(
    gates,
    values,
    groups,
    table,  # (2, table_size): all R roots of unity
    half,
    heads: tl.constexpr,
    planes: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
    width: tl.constexpr,
    row_block: tl.constexpr,
    row_blocks: tl.constexpr,
    table_size: tl.constexpr,
):
    """Any R, as a dense product; row r at position r. Grid: (B, tiles, blocks of rows)."""
    tile_size: tl.constexpr = rows * width
    image = tl.program_id(0)
    tile = tl.program_id(1)
    stored_columns = tl.num_programs(1) * width
    gates += image * heads
    values += tile.to(tl.int64) * (2 * planes * tile_size)
    groups += tile.to(tl.int64) * (planes * tile_size)
    half += image.to(tl.int64) * (row_blocks * row_block * 2) * stored_columns
    row = tl.program_id(2) * block + tl.arange(0, block)
    column = tl.arange(0, width)
    real = tl.zeros([block, width], tl.float32)
    imaginary = tl.zeros([block, width], tl.float32)
    for q in range(rows):
        xr, xi = _weighted(gates, values, groups, q * width + column, tile_size, planes)
        turn = q * row % rows
        cosine = tl.load(table + turn)[:, None]
        sine = tl.load(table + table_size + turn)[:, None]
        real += cosine * xr[None, :] - sine * xi[None, :]
        imaginary += sine * xr[None, :] + cosine * xi[None, :]
    at = half + _place(row[:, None], tile * width + column[None, :], stored_columns, row_block)
    inside = row[:, None] < rows
    tl.store(at, real, mask=inside)
    tl.store(at + stored_columns * row_block, imaginary, mask=inside)
