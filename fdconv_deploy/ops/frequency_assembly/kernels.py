"""The two Triton kernels of frequency assembly, and the inverse transform inside them.

The first weighs the spectrum by attention and inverts it along the rows. A program takes one
image and one tile of columns, whole. It reads its constants once, in the order they lie in, and
writes what stays in the second-level cache until the second kernel reads it: for each block of
rows that kernel takes together, one stretch of memory.

`attend_rows_kernel` is the same for who has no attentions yet: each program makes those that weigh
the spectrum from what pooling left, which is less work than a kernel before would be waited for.

The second inverts the columns onto real numbers, modulates and writes the weights. A program
takes a block of whole rows of the kernel matrix: all input channels and kernel columns of a few
(output channel, kernel row) pairs. A row is real, so two rows make one complex transform, one in
its real, one in its imaginary part. What the modulation needs beside them is small: a few local
weights a row, a window of the normalised average a column.

Transforms run in registers. A length N = T·M has T odd and M a power of two. The T-point
transforms come first, one output at a time, each followed by a transform of length M in passes
of radix up to 16. A pass is plain arithmetic on a tuple of tensors of one shape, so every thread
owns whole butterflies; only between passes do elements change threads (in Stockham's order, so
nothing is ever bit-reversed). No tensor core: at these lengths a transform's 5·N·log2 N
operations cost less than the products that would carry float32 through them, and every GPU
computes them exactly.

Complex tensors go as pairs (real, imaginary). S transforms run side by side, their index
fastest. Roots of unity come from one table per length, see `launch.root_table`. What keeps the
code this short also keeps compilation short: Triton's passes take time that grows with the
square of a kernel's operations, times its loads and stores.
"""

# mypy: ignore-errors
# ruff: noqa: RET505, RUF005
# Triton compiles these functions itself: their arguments are tensors, tuples and constants
# of its own language, which mypy does not know; a return needs its else, tuples grow by +.

import math

import triton
import triton.language as tl

from fdconv_deploy.ops.attention.kernels import hidden_layer, normalise_average
from fdconv_deploy.ops.dependent_launch import begin


@triton.constexpr_function
def _cosine(turns, length):
    return math.cos(2 * math.pi * turns / length)


@triton.constexpr_function
def _sine(turns, length):
    return math.sin(2 * math.pi * turns / length)


@triton.constexpr_function
def pass_radix(length, limit):
    """Of the first pass over ``length``: passes as few as can be, then as even as can be."""
    bits, most = length.bit_length() - 1, limit.bit_length() - 1
    return 2 ** -(-bits // max(1, -(-bits // most)))


@triton.jit
def _turned(xr, xi, turn: tl.constexpr, length: tl.constexpr):
    """Turn x by exp(2πi · turn / length), 0 ≤ turn < length / 2; easy angles without products."""
    if turn == 0:
        return xr, xi
    elif 4 * turn == length:
        return -xi, xr
    else:
        cosine: tl.constexpr = _cosine(turn, length)
        sine: tl.constexpr = _sine(turn, length)
        return xr * cosine - xi * sine, xr * sine + xi * cosine


@triton.jit
def _small_inverse(xr, xi):
    """Inverse transform over tuples of 2^k tensors; natural order."""
    length: tl.constexpr = len(xr)
    if length == 1:
        return xr, xi
    else:
        er, ei = _small_inverse(xr[0::2], xi[0::2])
        odd_r, odd_i = _small_inverse(xr[1::2], xi[1::2])
        yr = ()
        yi = ()
        upper_r = ()
        upper_i = ()
        for k in tl.static_range(length // 2):
            tr, ti = _turned(odd_r[k], odd_i[k], k, length)
            yr = yr + (er[k] + tr,)
            yi = yi + (ei[k] + ti,)
            upper_r = upper_r + (er[k] - tr,)
            upper_i = upper_i + (ei[k] - ti,)
        return yr + upper_r, yi + upper_i


@triton.jit
def _power(wr, wi, exponent: tl.constexpr):
    """Raise w to a power ≥ 1, by squaring: its rounding grows with the logarithm only."""
    if exponent == 1:
        return wr, wi
    else:
        hr, hi = _power(wr, wi, exponent // 2)
        sr = hr * hr - hi * hi
        si = 2 * (hr * hi)
        if exponent % 2 == 0:
            return sr, si
        else:
            return sr * wr - si * wi, sr * wi + si * wr


@triton.jit
def _joined(parts):
    """2^k tensors ``(X,)`` -> one ``(X, 2, … 2)``, the tuple's index in the new axes."""
    count: tl.constexpr = len(parts)
    if count == 1:
        return parts[0]
    else:
        return tl.join(_joined(parts[0::2]), _joined(parts[1::2]))


@triton.jit
def _parted(x, count: tl.constexpr):
    """``(X, count)`` -> count tensors ``(X,)``."""
    block: tl.constexpr = x.shape[0]
    if count == 1:
        return (tl.reshape(x, [block]),)
    else:
        even, odd = tl.split(tl.reshape(x, [block, count // 2, 2]))
        evens = _parted(even, count // 2)
        odds = _parted(odd, count // 2)
        parts = ()
        for i in tl.static_range(count // 2):
            parts = parts + (evens[i], odds[i])
        return parts


@triton.jit
def _interleaved(parts, block: tl.constexpr, inner: tl.constexpr):
    """Outputs of a pass, in the order of the next one's inputs: one flat tensor."""
    count: tl.constexpr = len(parts)
    x = tl.reshape(_joined(parts), [block, inner, count])
    return tl.reshape(tl.permute(x, [0, 2, 1]), [block * inner * count])


@triton.jit
def power_of_two_inverse(
    xr, xi, table, size, length: tl.constexpr, inner: tl.constexpr, limit: tl.constexpr
):
    """Inverse transform of ``length`` points, ``inner`` of them side by side.

    xr, xi: ``(length · inner,)``, point p of transform q at [p·inner + q]; so is the result.
    table: of the passes' roots, real parts; the imaginary ones are ``size`` further on.
    """
    total: tl.constexpr = xr.shape[0]
    if length == 1:
        return xr, xi
    else:
        radix: tl.constexpr = pass_radix(length, limit)
        block: tl.constexpr = length // radix
        part: tl.constexpr = total // radix
        yr, yi = _small_inverse(
            _parted(tl.permute(tl.reshape(xr, [radix, part]), [1, 0]), radix),
            _parted(tl.permute(tl.reshape(xi, [radix, part]), [1, 0]), radix),
        )
        if block == 1:
            return _interleaved(yr, 1, part), _interleaved(yi, 1, part)
        else:
            p = tl.arange(0, part) // inner
            wr = tl.load(table + p)
            wi = tl.load(table + size + p)
            tr = (yr[0],)
            ti = (yi[0],)
            for k in tl.static_range(1, radix):
                pr, pi = _power(wr, wi, k)
                tr = tr + (yr[k] * pr - yi[k] * pi,)
                ti = ti + (yr[k] * pi + yi[k] * pr,)
            zr = _interleaved(tr, block, inner)
            zi = _interleaved(ti, block, inner)
            return power_of_two_inverse(zr, zi, table + block, size, block, inner * radix, limit)


@triton.jit
def odd_output(
    xr, xi, k, table, size, power: tl.constexpr, inner: tl.constexpr, limit: tl.constexpr
):
    """Points k, T + k, 2T + k, … of the inverse transform of a length T·M.

    xr, xi: T tensors ``(M · inner,)``, point t·M + p of transform q at [p·inner + q] of the
    t-th. The result is one such tensor: point T·c + k at [c·inner + q].
    """
    odd: tl.constexpr = len(xr)
    if odd == 1:
        return power_of_two_inverse(xr[0], xi[0], table, size, power, inner, limit)
    else:
        yr = xr[0]
        yi = xi[0]
        for t in tl.static_range(1, odd):
            cosine = tl.load(table + t * k % odd)
            sine = tl.load(table + size + t * k % odd)
            yr += xr[t] * cosine - xi[t] * sine
            yi += xr[t] * sine + xi[t] * cosine
        place = table + odd + k * power + tl.arange(0, power * inner) // inner
        cosine = tl.load(place)
        sine = tl.load(place + size)
        zr = yr * cosine - yi * sine
        zi = yr * sine + yi * cosine
        passes = table + odd + odd * power
        return power_of_two_inverse(zr, zi, passes, size, power, inner, limit)


@triton.jit
def _weighted(
    gates, values, groups, at,
    tile_size: tl.constexpr, planes: tl.constexpr, held: tl.constexpr = False,
):  # fmt: skip
    """Entries ``at`` of one tile's spectrum, weighed and summed over the planes.

    gates: a pointer; where ``held``, the attentions themselves.
    """
    real = tl.zeros(at.shape, tl.float32)
    imaginary = tl.zeros(at.shape, tl.float32)
    for plane in tl.static_range(planes):
        group = tl.load(groups + plane * tile_size + at).to(tl.int32)
        gate = tl.gather(gates, group, 0) if held else tl.load(gates + group)
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
    outputs: tl.constexpr,  # of the odd part, per program
    width: tl.constexpr,
    row_block: tl.constexpr,
    row_blocks: tl.constexpr,
    table_size: tl.constexpr,
    dependent: tl.constexpr,
):
    """Lengths R = odd · power. Row odd·c + k is stored at position k·power + c.

    Grid: (B, tiles, parts of the odd outputs).
    """
    part: tl.constexpr = power * width
    image = tl.program_id(0)
    tile = tl.program_id(1)
    begin(dependent)
    stored_columns = tl.num_programs(1) * width
    gates += image * heads
    values += tile.to(tl.int64) * (2 * planes * odd * part)
    groups += tile.to(tl.int64) * (planes * odd * part)
    half += image.to(tl.int64) * (row_blocks * row_block * 2) * stored_columns

    _invert_rows(
        gates, values, groups, table, half, tile, tl.program_id(2) * outputs, stored_columns,
        planes, odd, power, limit, outputs, width, row_block, table_size, False,
    )  # fmt: skip


@triton.jit
def attend_rows_kernel(
    partial,  # (B, splits, blocks · units + channels) float32, of attention.kernels.pool_kernel
    hidden_bias,  # to average_bias: as of attention.kernels.gates_kernel
    norm_weight,
    norm_bias,
    heads,
    head_bias,
    average_weight,
    average_bias,
    values,  # to table: as of row_kernel
    groups,
    table,
    average,  # out: (B, channels) float32 (averaged only)
    gates,  # out: (B, count) float32, all but the kernel attentions, which nothing else reads
    half,  # out: as of row_kernel
    splits: tl.constexpr,
    blocks: tl.constexpr,
    channels: tl.constexpr,
    channel_pad: tl.constexpr,
    split_block: tl.constexpr,
    units: tl.constexpr,
    unit_pad: tl.constexpr,
    part_block: tl.constexpr,
    count: tl.constexpr,
    kernel: tl.constexpr,  # attentions that weigh the spectrum
    kernel_pad: tl.constexpr,
    each: tl.constexpr,  # of the others, per program
    each_pad: tl.constexpr,
    normed: tl.constexpr,
    centred: tl.constexpr,
    epsilon: tl.constexpr,
    squared: tl.constexpr,
    averaged: tl.constexpr,
    average_epsilon: tl.constexpr,
    planes: tl.constexpr,
    tiles: tl.constexpr,
    odd: tl.constexpr,
    power: tl.constexpr,
    limit: tl.constexpr,
    outputs: tl.constexpr,
    width: tl.constexpr,
    row_block: tl.constexpr,
    row_blocks: tl.constexpr,
    table_size: tl.constexpr,
    dependent: tl.constexpr,
):
    """As row_kernel, which needs no gates: every program makes the kernel attentions for itself.

    Of the other gates each program makes a few. Grid: (B, tiles, parts of the odd outputs), and
    one more tile where ``averaged``: its first program normalises the average.
    """
    image = tl.program_id(0)
    tile = tl.program_id(1)
    unit = tl.arange(0, unit_pad)
    first = tl.arange(0, kernel_pad)
    program = tile * tl.num_programs(2) + tl.program_id(2)
    weight, moved = _head(heads, head_bias, first, unit, kernel, units)
    begin(dependent)
    partial += image.to(tl.int64) * (splits * (blocks * units + channels))
    if tile < tiles:
        z = hidden_layer(
            partial, hidden_bias, norm_weight, norm_bias, splits, blocks, channels, units,
            unit_pad, part_block, normed, centred, epsilon, squared,
        )  # fmt: skip
        if each > 0:
            other = kernel + program * each + tl.arange(0, each_pad)
            stop = tl.minimum(kernel + (program + 1) * each, count)
            lines, offset = _head(heads, head_bias, other, unit, stop, units)
            gate = tl.sigmoid(tl.sum(lines * z[None, :], 1) + offset)
            tl.store(gates + image * count + other, gate, mask=other < stop)
        values += tile.to(tl.int64) * (2 * planes * odd * power * width)
        groups += tile.to(tl.int64) * (planes * odd * power * width)
        half += image.to(tl.int64) * (row_blocks * row_block * 2) * (tiles * width)
        _invert_rows(
            tl.sigmoid(tl.sum(weight * z[None, :], 1) + moved),
            values, groups, table, half, tile, tl.program_id(2) * outputs, tiles * width,
            planes, odd, power, limit, outputs, width, row_block, table_size, True,
        )  # fmt: skip
    else:
        if averaged and tl.program_id(2) == 0:
            normalise_average(
                partial, average_weight, average_bias, average + image * channels,
                splits, blocks, channels, channel_pad, split_block, units, average_epsilon,
            )  # fmt: skip


@triton.jit
def _head(heads, head_bias, head, unit, stop, units: tl.constexpr):
    """Weights and biases of the heads before ``stop``."""
    mask = (head < stop)[:, None] & (unit < units)[None, :]
    weight = tl.load(heads + head[:, None] * units + unit[None, :], mask=mask, other=0.0)
    return weight, tl.load(head_bias + head, mask=head < stop, other=0.0)


@triton.jit
def _invert_rows(
    gates, values, groups, table, half, tile, first, stored_columns,
    planes: tl.constexpr, odd: tl.constexpr, power: tl.constexpr, limit: tl.constexpr,
    outputs: tl.constexpr, width: tl.constexpr, row_block: tl.constexpr,
    table_size: tl.constexpr, held: tl.constexpr,
):  # fmt: skip
    """Weigh a tile and write ``outputs`` of the odd part's from the ``first`` on."""
    part: tl.constexpr = power * width
    lane = tl.arange(0, part)
    xr = ()
    xi = ()
    for t in tl.static_range(odd):
        entry = t * part + lane
        real, imaginary = _weighted(gates, values, groups, entry, odd * part, planes, held)
        xr = xr + (real,)
        xi = xi + (imaginary,)
    for n in range(outputs):
        k = first + n
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
    dependent: tl.constexpr,
):
    """Any R, as a dense product; row r at position r. Grid: (B, tiles, blocks of rows)."""
    tile_size: tl.constexpr = rows * width
    image = tl.program_id(0)
    tile = tl.program_id(1)
    begin(dependent)
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
    factor = tl.full(channel.shape, 1.0, tl.float32)
    if filter_at >= 0:
        factor *= tl.load(gates + filter_at + channel)
    if spatial_at >= 0:
        factor *= tl.load(gates + spatial_at + place)
    if scaled:
        factor *= tl.load(output_scale + channel)
    value *= factor[None, :]
    if taps > 0:
        taps_of_row = local_weight + row * (kernel_width * taps) + v * taps
        logit = tl.zeros(value.shape, tl.float32)
        for t in tl.static_range(taps):
            seen = ins + (t - taps // 2)
            inside = (seen >= 0) & (seen < in_channels)
            window = tl.load(average + seen, mask=inside, other=0.0)
            logit += window[:, None] * tl.load(taps_of_row + t)[None, :]
        value *= tl.sigmoid(logit)
    if channel_at >= 0:
        value *= tl.load(gates + channel_at + ins)[:, None]
    # Of weight (o, i, u, v) within one image's kernels.
    if channels_last:
        pixel = (channel * kernel_height + u) * kernel_width + v
        offset = pixel[None, :] * in_channels + ins[:, None]
    else:
        kernel = channel[None, :] * in_channels + ins[:, None]
        offset = (kernel * kernel_height + u[None, :]) * kernel_width + v
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
    outputs: tl.constexpr,  # of the odd part, per program
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
    dependent: tl.constexpr,
):
    """Lengths C = odd · power with kernel_width dividing odd.

    Grid: (B, row blocks, parts of the odd outputs).
    """
    rows: tl.constexpr = out_channels * kernel_height
    part: tl.constexpr = power * pairs
    image = tl.program_id(0)
    block = tl.program_id(1)
    begin(dependent)
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
    first = tl.program_id(2) * outputs
    for n in range(outputs):
        k = first + n
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
    dependent: tl.constexpr,
):
    """Any C, as a dense product. Grid: (B, row blocks, blocks of input channels · columns)."""
    rows: tl.constexpr = out_channels * kernel_height
    columns: tl.constexpr = in_channels * kernel_width
    image = tl.program_id(0)
    block = tl.program_id(1)
    begin(dependent)
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
