"""The bands' weighted sum: y = sum over terms t of factor[t] ∘ low[t].

low[0] is the input, the others its low-passes; factor = mix · act(logits) + mix_bias.

Three kernels: one projects each image row onto the widest band's frequencies; one applies each
band's low-pass along the columns of pixels, which is one square matrix there and back; the last
takes each row back and weighs and adds while it does, so no low-pass is ever written. What lies
between them has its channels last, whatever the input has.

The convolution that makes the logits has a few output channels, and a library's would take longer
than the three together. The first kernel has the input at hand: for each pixel and block of
channels it makes what the pixel gives to each map under each place of the convolution's window.
The second adds up what each pixel's window gives. Other convolutions are left to libraries.

`combination_kernel` is the last one alone for low-passes that products of a library made, as
TensorRT's graphs have them.
"""
# mypy: ignore-errors
# ruff: noqa: RET505, RUF005

import triton
import triton.language as tl

from fdconv_deploy.ops.attention.kernels import begin, feature_place


@triton.constexpr_function
def _total(columns, bands):
    """Columns of the first bands."""
    return sum(columns[:bands])


@triton.jit
def _product(total, left, right):
    """Left · right and what was there; float32 stays float32."""
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def project_rows_kernel(
    x,  # (B, channels, height, width), or channels last
    to_columns,  # (width, count), of x's type
    windows,  # (shares, channels), of x's type (shares > 0 only, else anything)
    given,  # out: (B, blocks of channels, shares, height · width) float32 (shares > 0 only)
    projected,  # out: (B, height, count, channels), of x's type
    c: tl.constexpr,  # shares: places of a window times maps; 0 where logits are made elsewhere
):
    """Grid: (B, rows · blocks of frequencies, blocks of channels)."""
    pixels: tl.constexpr = c.height * c.width
    image = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (c.count + c.count_block - 1) // c.count_block
    row = tl.program_id(1) // blocks
    place = tl.program_id(1) % blocks * c.count_block + tl.arange(0, c.count_block)
    channel = tl.program_id(2) * c.channel_block + tl.arange(0, c.channel_block)
    share = tl.arange(0, c.share_pad)
    if c.shares > 0:
        weight = tl.load(
            windows + share[None, :] * c.channels + channel[:, None],
            mask=(share < c.shares)[None, :] & (channel < c.channels)[:, None], other=0.0,
        )  # fmt: skip
        given += (image * tl.num_programs(2) + tl.program_id(2)) * (c.shares * pixels)
    begin(c)
    x += image * (c.channels * pixels)
    total = tl.zeros([c.count_block, c.channel_block], tl.float32)
    for first in range(0, c.width, c.pixel_block):
        pixel = first + tl.arange(0, c.pixel_block)
        matrix = tl.load(
            to_columns + pixel[None, :] * c.count + place[:, None],
            mask=(pixel < c.width)[None, :] & (place < c.count)[:, None], other=0.0,
        )  # fmt: skip
        flat = row * c.width + pixel[:, None]
        seen = tl.load(
            x + feature_place(flat, channel[None, :], c.channels, pixels, c),
            mask=(pixel < c.width)[:, None] & (channel < c.channels)[None, :], other=0.0,
        )  # fmt: skip
        total = _product(total, matrix, seen)
        if c.shares > 0:
            part = _product(tl.zeros([c.pixel_block, c.share_pad], tl.float32), seen, weight)
            at = share[None, :] * pixels + flat
            mask = (pixel < c.width)[:, None] & (share < c.shares)[None, :]
            # Of the programs that see these pixels, one for each block of frequencies.
            tl.store(given + at, part, mask=mask & (tl.program_id(1) % blocks == 0))
    at = ((image * c.height + row) * c.count + place[:, None]) * c.channels + channel[None, :]
    mask = (place < c.count)[:, None] & (channel < c.channels)[None, :]
    tl.store(projected + at, total.to(projected.dtype.element_ty), mask=mask)


@triton.jit
def _add_windows(given, logits, program, c: tl.constexpr):
    """Logits of the program-th block of pixels: over ``parts`` places of all blocks of channels.

    given, logits: the image's.
    """
    pixels: tl.constexpr = c.height * c.width
    pixel = program * c.pixel_block + tl.arange(0, c.pixel_block)
    part = tl.arange(0, c.part_pad)
    place = part % (c.window * c.window)
    down, right = place // c.window - c.window // 2, place % c.window - c.window // 2
    y = (pixel // c.width)[None, :] + down[:, None]
    x = (pixel % c.width)[None, :] + right[:, None]
    inside = (part < c.parts)[:, None] & (pixel < pixels)[None, :]
    inside &= (y >= 0) & (y < c.height) & (x >= 0) & (x < c.width)
    at = (part * (c.maps * pixels))[:, None] + y * c.width + x
    for w in tl.static_range(c.maps):
        total = tl.sum(tl.load(given + w * pixels + at, mask=inside, other=0.0), 0)
        at_map = feature_place(pixel, w, c.maps, pixels, c)
        tl.store(logits + at_map, total.to(logits.dtype.element_ty), mask=pixel < pixels)


@triton.jit
def filter_columns_kernel(
    projected,  # (B, rows, count · channels)
    through,  # (bands, rows, rows), of the same type
    given,  # (B, parts, maps, height · width) float32 (maps > 0 only, else anything)
    logits,  # out: (B, maps, height, width), or channels last (maps > 0 only)
    filtered,  # out: (B, rows, sum(columns) · channels), of the same type
    c: tl.constexpr,
):
    """Grid: (B, blocks of rows, blocks of columns, band after band, and then of pixels).

    count: columns of ``projected``; columns: of each band; column_block, column_blocks: of pairs
    (frequency, channel), of all bands; maps: 0 where logits are made elsewhere. As many blocks of
    pixels on the third axis as on both hold all of them.
    """
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(2)
    begin(c)
    if block < c.column_blocks:
        projected += image * (c.rows * c.count * c.channels)
        filtered += image * (c.rows * _total(c.columns, len(c.columns)) * c.channels)
        _filter(projected, through, filtered, tl.program_id(1), block, c)
    else:
        if c.maps > 0:
            given += image * (c.parts * c.maps * c.height * c.width)
            logits += image * (c.maps * c.height * c.width)
            program = (block - c.column_blocks) * tl.num_programs(1) + tl.program_id(1)
            _add_windows(given, logits, program, c)


@triton.jit
def _filter(projected, through, filtered, row_program, block, c: tl.constexpr):
    """One block of rows of one block of columns."""
    row = row_program * c.row_block + tl.arange(0, c.row_block)
    # Which band's block this is, and how many blocks the bands before have.
    band = 0
    width = 0
    start = 0
    mine = 0
    before = 0
    stored: tl.constexpr = _total(c.columns, len(c.columns)) * c.channels
    for b in tl.static_range(len(c.columns)):
        after = before + (c.columns[b] * c.channels + c.column_block - 1) // c.column_block
        here = (block >= before) & (block < after)
        band += tl.where(here, b, 0)
        width += tl.where(here, c.columns[b] * c.channels, 0)
        start += tl.where(here, _total(c.columns, b) * c.channels, 0)
        mine += tl.where(here, block - before, 0)
        before = after
    column = mine * c.column_block + tl.arange(0, c.column_block)
    through += band * (c.rows * c.rows)
    total = tl.zeros([c.row_block, c.column_block], tl.float32)
    for first in range(0, c.rows, c.inner_block):
        inner = first + tl.arange(0, c.inner_block)
        matrix = tl.load(
            through + row[:, None] * c.rows + inner[None, :],
            mask=(row < c.rows)[:, None] & (inner < c.rows)[None, :], other=0.0,
        )  # fmt: skip
        seen = tl.load(
            projected + inner[:, None] * (c.count * c.channels) + column[None, :],
            mask=(inner < c.rows)[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        total = _product(total, matrix, seen)
    at = row[:, None] * stored + start + column[None, :]
    mask = (row < c.rows)[:, None] & (column < width)[None, :]
    tl.store(filtered + at, total.to(filtered.dtype.element_ty), mask=mask)


@triton.jit
def _group(channel, c: tl.constexpr):
    """The group of maps of each channel."""
    if c.groups == 1:
        return tl.zeros([1, 1], tl.int32)
    else:
        return channel // (c.channels // c.groups)


@triton.jit
def _maps(logits, shift, pixel, group, mapped, pixels: tl.constexpr, c: tl.constexpr):
    """The ``weighted`` maps of a group at some pixels, a tuple; ``logits``: the image's."""
    count: tl.constexpr = c.groups * c.weighted
    maps = ()
    for w in tl.static_range(c.weighted):
        number = group * c.weighted + w
        at = feature_place(pixel, number, count, pixels, c)
        z = tl.load(logits + at, mask=mapped, other=0.0).to(tl.float32)
        if c.biased:
            z += tl.load(shift + number, mask=number < count, other=0.0)
        if c.sigmoid:
            z = tl.sigmoid(z)
        maps = maps + (z,)
    return maps


@triton.jit
def _factor(maps, mix, mix_bias, group, t, c: tl.constexpr):
    """What the t-th term is multiplied by."""
    term = group * c.terms + t
    inside = group < c.groups
    factor = tl.load(mix_bias + term, mask=inside, other=0.0)
    for w in tl.static_range(c.weighted):
        factor += tl.load(mix + term * c.weighted + w, mask=inside, other=0.0) * maps[w]
    return factor


@triton.jit
def modulate_rows_kernel(
    x,  # (B, channels, height, width), or channels last
    logits,  # (B, groups · weighted, height, width), as x
    shift,  # (groups · weighted,) float32, added to logits (biased only)
    mix,  # (groups · terms, weighted) float32
    mix_bias,  # (groups · terms,) float32
    filtered,  # (B, height, parts, sum(columns), channels), of x's type
    from_columns,  # (parts · sum(columns), width), of x's type: band after band
    y,  # out: as x
    c: tl.constexpr,
):
    """Grid: (B, rows · blocks of pixels, blocks of channels); parts: 2 where rows are complex."""
    pixels: tl.constexpr = c.height * c.width
    image = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (c.width + c.pixel_block - 1) // c.pixel_block
    row = tl.program_id(1) // blocks
    pixel = tl.program_id(1) % blocks * c.pixel_block + tl.arange(0, c.pixel_block)
    channel = tl.program_id(2) * c.channel_block + tl.arange(0, c.channel_block)
    inside = (pixel < c.width)[:, None] & (channel < c.channels)[None, :]
    begin(c)
    x += image * (c.channels * pixels)
    y += image * (c.channels * pixels)
    logits += image * (c.groups * c.weighted * pixels)
    group = _group(channel[None, :], c)
    mapped = (pixel < c.width)[:, None] if c.groups == 1 else inside
    flat = row * c.width + pixel[:, None]
    maps = _maps(logits, shift, flat, group, mapped, pixels, c)

    at = feature_place(flat, channel[None, :], c.channels, pixels, c)
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    total *= _factor(maps, mix, mix_bias, group, 0, c)
    stored: tl.constexpr = _total(c.columns, len(c.columns))
    filtered += (image * c.height + row) * (c.parts * stored * c.channels)
    for b in tl.static_range(len(c.columns)):
        low = tl.zeros([c.pixel_block, c.channel_block], tl.float32)
        start = _total(c.columns, b)
        for first in range(0, c.parts * c.columns[b], c.inner_block):
            inner = first + tl.arange(0, c.inner_block)
            kept = inner < c.parts * c.columns[b]
            matrix = tl.load(
                from_columns + (c.parts * start + inner)[None, :] * c.width + pixel[:, None],
                mask=kept[None, :] & (pixel < c.width)[:, None], other=0.0,
            )  # fmt: skip
            place = inner // c.columns[b] * stored + start + inner % c.columns[b]
            seen = tl.load(
                filtered + place[:, None] * c.channels + channel[None, :],
                mask=kept[:, None] & (channel < c.channels)[None, :], other=0.0,
            )  # fmt: skip
            low = _product(low, matrix, seen)
        total += low * _factor(maps, mix, mix_bias, group, b + 1, c)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def combination_kernel(
    x,  # (B, I, pixels), or (B, pixels, I) channels last
    logits,  # (B, groups · weighted, pixels), or channels last
    mix,  # (groups · terms, weighted) float32
    mix_bias,  # (groups · terms,) float32
    lows,  # (terms - 1, B, …) as x
    y,  # out: as x
    c: tl.constexpr,
):
    """Grid: (B, blocks of pixels, blocks of channels)."""
    image = tl.program_id(0).to(tl.int64)
    begin(c)
    pixel = (tl.program_id(1) * c.pixel_block + tl.arange(0, c.pixel_block))[:, None]
    channel = (tl.program_id(2) * c.channel_block + tl.arange(0, c.channel_block))[None, :]
    inside = (pixel < c.pixels) & (channel < c.channels)
    group = _group(channel, c)
    mapped = pixel < c.pixels if c.groups == 1 else inside
    logits += image * (c.groups * c.weighted * c.pixels)
    maps = _maps(logits, mix, pixel, group, mapped, c.pixels, c)

    at = feature_place(pixel, channel, c.channels, c.pixels, c)
    size: tl.constexpr = c.channels * c.pixels
    total = tl.zeros([c.pixel_block, c.channel_block], tl.float32)
    for t in tl.static_range(c.terms):
        factor = _factor(maps, mix, mix_bias, group, t, c)
        if t == 0:
            source = x + image * size
        else:
            source = lows + ((t - 1) * tl.num_programs(0) + image) * size
        total += factor * tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + image * size + at, total.to(y.dtype.element_ty), mask=inside)
