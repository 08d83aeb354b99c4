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

from fdconv_deploy.ops.attention.kernels import begin, hidden_layer, load_heads, normalise_average
from fdconv_deploy.ops.frequency_assembly import launch


@triton.constexpr_function
def _cosine(turns, length):
    return math.cos(2 * math.pi * turns / length)


@triton.constexpr_function
def _sine(turns, length):
    return math.sin(2 * math.pi * turns / length)


pass_radix = triton.constexpr_function(launch.pass_radix)


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
def odd_output(xr, xi, k, table, inner: tl.constexpr, c: tl.constexpr):
    """Points k, T + k, 2T + k, … of the inverse transform of a length T·M = odd · power.

    xr, xi: T tensors ``(M · inner,)``, point t·M + p of transform q at [p·inner + q] of the
    t-th. The result is one such tensor: point T·c + k at [c·inner + q].
    """
    odd: tl.constexpr = len(xr)
    size: tl.constexpr = c.table_size
    if odd == 1:
        return power_of_two_inverse(xr[0], xi[0], table, size, c.power, inner, c.limit)
    else:
        yr = xr[0]
        yi = xi[0]
        for t in tl.static_range(1, odd):
            cosine = tl.load(table + t * k % odd)
            sine = tl.load(table + size + t * k % odd)
            yr += xr[t] * cosine - xi[t] * sine
            yi += xr[t] * sine + xi[t] * cosine
        place = table + odd + k * c.power + tl.arange(0, c.power * inner) // inner
        cosine = tl.load(place)
        sine = tl.load(place + size)
        zr = yr * cosine - yi * sine
        zi = yr * sine + yi * cosine
        passes = table + odd + odd * c.power
        return power_of_two_inverse(zr, zi, passes, size, c.power, inner, c.limit)


@triton.jit
def _weighted(gates, values, groups, at, c: tl.constexpr, held: tl.constexpr = False):
    """Entries ``at`` of one tile's spectrum, weighed and summed over the planes.

    gates: a pointer; where ``held``, the attentions themselves.
    """
    tile_size: tl.constexpr = c.rows * c.width
    real = tl.zeros(at.shape, tl.float32)
    imaginary = tl.zeros(at.shape, tl.float32)
    for plane in tl.static_range(c.planes):
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
def _tile_of(values, groups, half, image, tile, stored_columns, c: tl.constexpr):
    """Where a tile's constants begin, and what is made of an image."""
    size: tl.constexpr = c.planes * c.rows * c.width
    values += tile.to(tl.int64) * (2 * size)
    groups += tile.to(tl.int64) * size
    half += image.to(tl.int64) * (c.row_blocks * c.row_block * 2) * stored_columns
    return values, groups, half


@triton.jit
def row_kernel(
    gates,  # (B, heads) float32: the kernel attentions first
    values,  # (tiles, planes, 2, R, width) float32
    groups,  # (tiles, planes, R, width) uint8 or int32
    table,  # (2, table_size) float32
    half,  # out: (B, row blocks, 2, tiles · width, row_block) float32
    c: tl.constexpr,
):
    """Lengths R = odd · power. Row odd·c + k is stored at position k·power + c.

    Grid: (B, tiles, parts of the odd outputs).
    """
    image = tl.program_id(0)
    tile = tl.program_id(1)
    begin(c)
    stored_columns = tl.num_programs(1) * c.width
    gates += image * c.heads
    values, groups, half = _tile_of(values, groups, half, image, tile, stored_columns, c)
    first = tl.program_id(2) * c.outputs
    _invert_rows(gates, values, groups, table, half, tile, first, stored_columns, c, False)


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
    c: tl.constexpr,
):
    """As row_kernel, which needs no gates: every program makes the kernel attentions for itself.

    Of the other gates each program makes a few. Grid: (B, tiles, parts of the odd outputs), and
    one more tile where ``averaged``: its first program normalises the average.
    """
    image = tl.program_id(0)
    tile = tl.program_id(1)
    unit = tl.arange(0, c.unit_pad)
    first = tl.arange(0, c.kernel_pad)
    program = tile * tl.num_programs(2) + tl.program_id(2)
    weight, moved = load_heads(heads, head_bias, first, unit, c.kernel, c)
    begin(c)
    partial += image.to(tl.int64) * (c.splits * c.stride)
    if tile < c.tiles:
        z = hidden_layer(partial, hidden_bias, norm_weight, norm_bias, c)
        if c.each > 0:
            other = c.kernel + program * c.each + tl.arange(0, c.each_pad)
            stop = tl.minimum(c.kernel + (program + 1) * c.each, c.count)
            lines, offset = load_heads(heads, head_bias, other, unit, stop, c)
            gate = tl.sigmoid(tl.sum(lines * z[None, :], 1) + offset)
            tl.store(gates + image * c.count + other, gate, mask=other < stop)
        columns: tl.constexpr = c.tiles * c.width
        values, groups, half = _tile_of(values, groups, half, image, tile, columns, c)
        held = tl.sigmoid(tl.sum(weight * z[None, :], 1) + moved)
        output = tl.program_id(2) * c.outputs
        _invert_rows(held, values, groups, table, half, tile, output, columns, c, True)
    else:
        if c.averaged and tl.program_id(2) == 0:
            average += image * c.channels
            normalise_average(partial, average_weight, average_bias, average, c)


@triton.jit
def _invert_rows(
    gates, values, groups, table, half, tile, first, stored_columns,
    c: tl.constexpr, held: tl.constexpr,
):  # fmt: skip
    """Weigh a tile and write ``outputs`` of the odd part's from the ``first`` on."""
    part: tl.constexpr = c.power * c.width
    lane = tl.arange(0, part)
    xr = ()
    xi = ()
    for t in tl.static_range(c.odd):
        real, imaginary = _weighted(gates, values, groups, t * part + lane, c, held)
        xr = xr + (real,)
        xi = xi + (imaginary,)
    column = tile * c.width + lane % c.width
    for n in range(c.outputs):
        k = first + n
        yr, yi = odd_output(xr, xi, k, table, c.width, c)
        row = k * c.power + lane // c.width
        at = half + _place(row, column, stored_columns, c.row_block)
        tl.store(at, yr)
        tl.store(at + stored_columns * c.row_block, yi)


@triton.jit
def dense_row_kernel(
    gates,
    values,
    groups,
    table,  # (2, table_size): all R roots of unity
    half,
    c: tl.constexpr,
):
    """Any R, as a dense product; row r at position r. Grid: (B, tiles, blocks of rows)."""
    image = tl.program_id(0)
    tile = tl.program_id(1)
    begin(c)
    stored_columns = tl.num_programs(1) * c.width
    gates += image * c.heads
    values, groups, half = _tile_of(values, groups, half, image, tile, stored_columns, c)
    row = tl.program_id(2) * c.block + tl.arange(0, c.block)
    column = tl.arange(0, c.width)
    real = tl.zeros([c.block, c.width], tl.float32)
    imaginary = tl.zeros([c.block, c.width], tl.float32)
    for q in range(c.rows):
        xr, xi = _weighted(gates, values, groups, q * c.width + column, c)
        turn = q * row % c.rows
        cosine = tl.load(table + turn)[:, None]
        sine = tl.load(table + c.table_size + turn)[:, None]
        real += cosine * xr[None, :] - sine * xi[None, :]
        imaginary += sine * xr[None, :] + cosine * xi[None, :]
    column = (tile * c.width + column)[None, :]
    at = half + _place(row[:, None], column, stored_columns, c.row_block)
    inside = row[:, None] < c.rows
    tl.store(at, real, mask=inside)
    tl.store(at + stored_columns * c.row_block, imaginary, mask=inside)


@triton.jit
def _row_pairs(half, first, frequency, c: tl.constexpr):
    """Spectrum of rows 2q + i·(rows 2q + 1), ``frequency`` and q flat.

    half: the row block's entries; first: its first row. Rows past the last are zero: nothing
    was stored for them, and they would share a transform with one that counts.
    """
    columns: tl.constexpr = c.odd * c.power
    row_block: tl.constexpr = 2 * c.pairs
    mirrored = frequency > columns // 2
    column = tl.where(mirrored, columns - frequency, frequency)
    slot = tl.arange(0, frequency.shape[0]) % c.pairs * 2
    slots = slot[:, None] + tl.arange(0, 2)[None, :]
    at = half + (column * row_block)[:, None] + slots
    # Imaginary parts of columns 0 and C/2 are dropped.
    complex_ = tl.broadcast_to(((frequency > 0) & (2 * frequency != columns))[:, None], at.shape)
    if c.rows % row_block == 0:
        real = tl.load(at)
    else:
        inside = first + slots < c.rows
        complex_ = complex_ & inside
        real = tl.load(at, mask=inside, other=0.0)
    ar, br = tl.split(real)
    ai, bi = tl.split(tl.load(at + c.stored_columns * row_block, mask=complex_, other=0.0))
    ai = tl.where(mirrored, -ai, ai)
    bi = tl.where(mirrored, -bi, bi)
    return ar - bi, ai + br


@triton.jit
def _modulate_and_store(
    value, position, v, ins, gates, average, local_weight, output_scale, weight, c: tl.constexpr
):
    """``value`` (input channels, rows), all of kernel column v; ``position`` is the rows'."""
    valid = position < c.rows
    # What lies outside computes on the first row, and is not stored.
    position = tl.where(valid, position, 0)
    row = position % c.row_power * c.row_odd + position // c.row_power
    channel = row // c.kernel_height
    u = row % c.kernel_height
    place = u * c.kernel_width + v
    factor = tl.full(channel.shape, 1.0, tl.float32)
    if c.filter_at >= 0:
        factor *= tl.load(gates + c.filter_at + channel)
    if c.spatial_at >= 0:
        factor *= tl.load(gates + c.spatial_at + place)
    if c.scaled:
        factor *= tl.load(output_scale + channel)
    value *= factor[None, :]
    if c.taps > 0:
        taps_of_row = local_weight + row * (c.kernel_width * c.taps) + v * c.taps
        logit = tl.zeros(value.shape, tl.float32)
        for t in tl.static_range(c.taps):
            seen = ins + (t - c.taps // 2)
            inside = (seen >= 0) & (seen < c.in_channels)
            window = tl.load(average + seen, mask=inside, other=0.0)
            logit += window[:, None] * tl.load(taps_of_row + t)[None, :]
        value *= tl.sigmoid(logit)
    if c.channel_at >= 0:
        value *= tl.load(gates + c.channel_at + ins)[:, None]
    # Of weight (o, i, u, v) within one image's kernels.
    if c.channels_last:
        pixel = (channel * c.kernel_height + u) * c.kernel_width + v
        offset = pixel[None, :] * c.in_channels + ins[:, None]
    else:
        kernel = channel[None, :] * c.in_channels + ins[:, None]
        offset = (kernel * c.kernel_height + u[None, :]) * c.kernel_width + v
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
    c: tl.constexpr,
):
    """Lengths C = odd · power with kernel_width dividing odd.

    Grid: (B, row blocks, parts of the odd outputs).
    """
    row_block: tl.constexpr = 2 * c.pairs
    image = tl.program_id(0)
    block = tl.program_id(1)
    begin(c)
    gates += image * c.heads
    average += image * c.in_channels
    half += (image * tl.num_programs(1) + block).to(tl.int64) * (2 * row_block * c.stored_columns)
    weight += image.to(tl.int64) * (c.rows * c.in_channels * c.kernel_width)

    point = tl.arange(0, c.power * c.pairs) // c.pairs
    xr = ()
    xi = ()
    for t in tl.static_range(c.odd):
        real, imaginary = _row_pairs(half, block * row_block, t * c.power + point, c)
        xr = xr + (real,)
        xi = xi + (imaginary,)
    # Column odd·c + k = kernel_width · i + v: each k is of one v, and of every `near`-th i.
    near: tl.constexpr = c.odd // c.kernel_width
    position = block * row_block + tl.arange(0, row_block)
    first = tl.program_id(2) * c.outputs
    for n in range(c.outputs):
        k = first + n
        yr, yi = odd_output(xr, xi, k, table, c.pairs, c)
        value = tl.reshape(tl.join(yr, yi), [c.power, row_block])
        ins = near * tl.arange(0, c.power) + k // c.kernel_width
        _modulate_and_store(
            value, position, k % c.kernel_width, ins,
            gates, average, local_weight, output_scale, weight, c,
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
    c: tl.constexpr,
):
    """Any C, as a dense product. Grid: (B, row blocks, blocks of input channels · columns)."""
    columns: tl.constexpr = c.in_channels * c.kernel_width
    image = tl.program_id(0)
    block = tl.program_id(1)
    begin(c)
    gates += image * c.heads
    average += image * c.in_channels
    half += (image * tl.num_programs(1) + block).to(tl.int64) * (2 * c.row_block * c.stored_columns)
    weight += image.to(tl.int64) * (c.rows * columns)
    v = tl.program_id(2) % c.kernel_width
    ins = tl.program_id(2) // c.kernel_width * c.channel_block + tl.arange(0, c.channel_block)
    # Lanes past the last channel compute it again and store the same number.
    ins = tl.minimum(ins, c.in_channels - 1)
    column = ins * c.kernel_width + v
    slot = tl.arange(0, c.row_block)
    value = tl.zeros([c.channel_block, c.row_block], tl.float32)
    for frequency in range(0, columns // 2 + 1):
        at = half + frequency * c.row_block + slot
        turn = frequency * column % columns
        single = (frequency == 0) | (2 * frequency == columns)
        twice = tl.where(single, 1.0, 2.0)
        real = twice * tl.load(at)
        imaginary = tl.where(single, 0.0, 2.0) * tl.load(at + c.stored_columns * c.row_block)
        value += tl.load(table + turn)[:, None] * real[None, :]
        value -= tl.load(table + c.table_size + turn)[:, None] * imaginary[None, :]
    _modulate_and_store(
        value, block * c.row_block + slot, v, ins,
        gates, average, local_weight, output_scale, weight, c,
    )  # fmt: skip
