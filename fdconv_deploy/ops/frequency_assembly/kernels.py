"""Second assembly kernel: columns inverted onto real numbers, modulated, written as weights.

A program takes a block of whole rows of the kernel matrix: all input channels and kernel
columns of a few (output channel, kernel row) pairs. A row is real, so two rows make one
complex transform, one in its real, one in its imaginary part. What the modulation needs
beside them is small: a few local weights a row, a window of the normalised average a column.
"""
# mypy: ignore-errors
# ruff: noqa: RET505, RUF005

import triton
import triton.language as tl

from fdconv_deploy.ops.frequency_assembly.kernel_transform import odd_output


@triton.jit
def _row_pairs(
    half, first, frequency,
    rows: tl.constexpr, columns: tl.constexpr, stored_columns: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    """Spectrum of rows 2q + i·(rows 2q + 1), ``frequency`` and q flat.

    half: the row block's entries; first: its first row. Rows past the last are zero: nothing
    was stored for them, and they would share a transform with one that counts.
    """
    mirrored = frequency > columns // 2
    column = tl.where(mirrored, columns - frequency, frequency)
    slot = tl.arange(0, frequency.shape[0]) % pairs * 2
    slots = slot[:, None] + tl.arange(0, 2)[None, :]
    at = half + (column * (2 * pairs))[:, None] + slots
    # Imaginary parts of columns 0 and C/2 are dropped.
    complex_ = tl.broadcast_to(((frequency > 0) & (2 * frequency != columns))[:, None], at.shape)
    if rows % (2 * pairs) == 0:
        real = tl.load(at)
    else:
        inside = first + slots < rows
        complex_ = complex_ & inside
        real = tl.load(at, mask=inside, other=0.0)
    ar, br = tl.split(real)
    ai, bi = tl.split(tl.load(at + stored_columns * 2 * pairs, mask=complex_, other=0.0))
    ai = tl.where(mirrored, -ai, ai)
    bi = tl.where(mirrored, -bi, bi)
    return ar - bi, ai + br


@triton.jit
def _row_factor(
    gates, output_scale, channel, place,
    filter_at: tl.constexpr, spatial_at: tl.constexpr, scaled: tl.constexpr,
):  # fmt: skip
    """Filter and spatial attention and the following BatchNorm's scale, as far as there are."""
    factor = tl.full(channel.shape, 1.0, tl.float32)
    if filter_at >= 0:
        factor *= tl.load(gates + filter_at + channel)
    if spatial_at >= 0:
        factor *= tl.load(gates + spatial_at + place)
    if scaled:
        factor *= tl.load(output_scale + channel)
    return factor


@triton.jit
def _window(average, position, in_channels: tl.constexpr):
    inside = (position >= 0) & (position < in_channels)
    return tl.load(average + position, mask=inside, other=0.0)


@triton.jit
def _weight_offset(
    channel, ins, u, v,
    in_channels: tl.constexpr, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    channels_last: tl.constexpr,
):  # fmt: skip
    """Of weight (o, i, u, v) within one image's kernels."""
    if channels_last:
        return ((channel * kernel_height + u) * kernel_width + v) * in_channels + ins
    else:
        return ((channel * in_channels + ins) * kernel_height + u) * kernel_width + v


@triton.jit
def _modulate_and_store(
    value, position, v, ins, gates, average, local_weight, output_scale, weight,
    rows: tl.constexpr, row_odd: tl.constexpr, row_power: tl.constexpr,
    in_channels: tl.constexpr, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    taps: tl.constexpr, filter_at: tl.constexpr, spatial_at: tl.constexpr,
    channel_at: tl.constexpr, scaled: tl.constexpr, channels_last: tl.constexpr,
):  # fmt: skip
    """``value`` (input channels, rows), all of kernel column v; ``position`` is the rows'."""
    valid = position < rows
    # What lies outside computes on the first row, and is not stored.
    position = tl.where(valid, position, 0)
    row = position % row_power * row_odd + position // row_power
    channel = row // kernel_height
    u = row % kernel_height
    place = u * kernel_width + v
    factor = _row_factor(gates, output_scale, channel, place, filter_at, spatial_at, scaled)
    value *= factor[None, :]
    if taps > 0:
        taps_of_row = local_weight + row * (kernel_width * taps) + v * taps
        logit = tl.zeros(value.shape, tl.float32)
        for t in tl.static_range(taps):
            window = _window(average, ins + (t - taps // 2), in_channels)
            logit += window[:, None] * tl.load(taps_of_row + t)[None, :]
        value *= tl.sigmoid(logit)
    if channel_at >= 0:
        value *= tl.load(gates + channel_at + ins)[:, None]
    offset = _weight_offset(
        channel[None, :], ins[:, None], u[None, :], v,
        in_channels, kernel_height, kernel_width, channels_last,
    )  # fmt: skip
    tl.store(weight + offset, value.to(weight.dtype.element_ty), mask=valid[None, :])


@triton.jit
def column_kernel(
    half,  # (B, row blocks, 2, stored_columns, 2 · pairs) float32
    gates,  # (B, heads) float32, after their activations
    table,  # (2, table_size) float32
    average,  # (B, I) float32: the normalised average (local only, else anything)
    local_weight,  # (R, kernel_width · taps) float32 (local only)
    output_scale,  # (O,) float32 (scaled only)
    weight,  # out: (B·O, I, kernel_height, kernel_width), or channels last
    heads: tl.constexpr,
    odd: tl.constexpr,
    power: tl.constexpr,
    limit: tl.constexpr,
    table_size: tl.constexpr,
    stored_columns: tl.constexpr,
    pairs: tl.constexpr,  # of rows per program
    row_odd: tl.constexpr,  # how the first kernel ordered the rows
    row_power: tl.constexpr,
    out_channels: tl.constexpr,
    in_channels: tl.constexpr,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    taps: tl.constexpr,  # 0: no local attention
    filter_at: tl.constexpr,  # where in a row of gates; -1: there is none
    spatial_at: tl.constexpr,
    channel_at: tl.constexpr,
    scaled: tl.constexpr,
    channels_last: tl.constexpr,
):
    """Lengths C = odd · power with kernel_width dividing odd. Grid: (B, row blocks)."""
    rows: tl.constexpr = out_channels * kernel_height
    part: tl.constexpr = power * pairs
    image = tl.program_id(0)
    block = tl.program_id(1)
    gates += image * heads
    average += image * in_channels
    half += (image * tl.num_programs(1) + block).to(tl.int64) * (4 * pairs * stored_columns)
    weight += image.to(tl.int64) * (rows * in_channels * kernel_width)

    point = tl.arange(0, part) // pairs
    xr = ()
    xi = ()
    for t in tl.static_range(odd):
        real, imaginary = _row_pairs(
            half, block * (2 * pairs), t * power + point,
            rows, odd * power, stored_columns, pairs,
        )  # fmt: skip
        xr = xr + (real,)
        xi = xi + (imaginary,)
    # Column odd·c + k = kernel_width · i + v: each k is of one v, and of every `near`-th i.
    near: tl.constexpr = odd // kernel_width
    position = block * (2 * pairs) + tl.arange(0, 2 * pairs)
    for k in range(odd):
        yr, yi = odd_output(xr, xi, k, table, table_size, power, pairs, limit)
        value = tl.reshape(tl.join(yr, yi), [power, 2 * pairs])
        ins = near * tl.arange(0, power) + k // kernel_width
        _modulate_and_store(
            value, position, k % kernel_width, ins,
            gates, average, local_weight, output_scale, weight,
            rows, row_odd, row_power, in_channels, kernel_height, kernel_width,
            taps, filter_at, spatial_at, channel_at, scaled, channels_last,
        )  # fmt: skip


@triton.jit
def dense_column_kernel(
    half,
    gates,
    table,  # (2, table_size): all C roots of unity
    average,
    local_weight,
    output_scale,
    weight,
    heads: tl.constexpr,
    table_size: tl.constexpr,
    stored_columns: tl.constexpr,
    row_block: tl.constexpr,
    row_odd: tl.constexpr,
    row_power: tl.constexpr,
    channel_block: tl.constexpr,
    out_channels: tl.constexpr,
    in_channels: tl.constexpr,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    taps: tl.constexpr,
    filter_at: tl.constexpr,
    spatial_at: tl.constexpr,
    channel_at: tl.constexpr,
    scaled: tl.constexpr,
    channels_last: tl.constexpr,
):
    """Any C, as a dense product. Grid: (B, row blocks, blocks of input channels · columns)."""
    rows: tl.constexpr = out_channels * kernel_height
    columns: tl.constexpr = in_channels * kernel_width
    image = tl.program_id(0)
    block = tl.program_id(1)
    gates += image * heads
    average += image * in_channels
    half += (image * tl.num_programs(1) + block).to(tl.int64) * (2 * row_block * stored_columns)
    weight += image.to(tl.int64) * (rows * columns)
    v = tl.program_id(2) % kernel_width
    ins = tl.program_id(2) // kernel_width * channel_block + tl.arange(0, channel_block)
    # Lanes past the last channel compute it again and store the same number.
    ins = tl.minimum(ins, in_channels - 1)
    column = ins * kernel_width + v
    slot = tl.arange(0, row_block)
    value = tl.zeros([channel_block, row_block], tl.float32)
    for frequency in range(0, columns // 2 + 1):
        at = half + frequency * row_block + slot
        turn = frequency * column % columns
        single = (frequency == 0) | (2 * frequency == columns)
        twice = tl.where(single, 1.0, 2.0)
        real = twice * tl.load(at)
        imaginary = tl.where(single, 0.0, 2.0) * tl.load(at + stored_columns * row_block)
        value += tl.load(table + turn)[:, None] * real[None, :]
        value -= tl.load(table + table_size + turn)[:, None] * imaginary[None, :]
    _modulate_and_store(
        value, block * row_block + slot, v, ins,
        gates, average, local_weight, output_scale, weight,
        rows, row_odd, row_power, in_channels, kernel_height, kernel_width,
        taps, filter_at, spatial_at, channel_at, scaled, channels_last,
    )  # fmt: skip
