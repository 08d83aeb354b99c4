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
# ruff: noqa: RUF005

import triton
import triton.language as tl

from fdconv_deploy.ops.dependent_launch import begin


@triton.jit
def combination_kernel(
    x,  # (B, I, pixels), or (B, pixels, I) channels last
    logits,  # (B, groups · weighted, pixels), or channels last
    mix,  # (groups · terms, weighted) float32
    mix_bias,  # (groups · terms,) float32
    lows,  # (terms - 1, B, …) as x
    y,  # out: as x
    channels: tl.constexpr,
    pixels: tl.constexpr,
    groups: tl.constexpr,
    weighted: tl.constexpr,
    terms: tl.constexpr,
    pixel_block: tl.constexpr,
    channel_block: tl.constexpr,
    sigmoid: tl.constexpr,
    channels_last: tl.constexpr,
    dependent: tl.constexpr,
):
    """Grid: (B, blocks of pixels, blocks of channels)."""
    image = tl.program_id(0).to(tl.int64)
    begin(dependent)
    pixel = (tl.program_id(1) * pixel_block + tl.arange(0, pixel_block))[:, None]
    channel = (tl.program_id(2) * channel_block + tl.arange(0, channel_block))[None, :]
    inside = (pixel < pixels) & (channel < channels)
    count: tl.constexpr = groups * weighted
    if channels_last:
        at = pixel * channels + channel
        pixel_step: tl.constexpr = count
        map_step: tl.constexpr = 1
    else:
        at = channel * pixels + pixel
        pixel_step: tl.constexpr = 1
        map_step: tl.constexpr = pixels
    if groups == 1:
        group = tl.zeros([1, 1], tl.int32)
        mapped = pixel < pixels
    else:
        group = channel // (channels // groups)
        mapped = inside
    maps = ()
    for w in tl.static_range(weighted):
        place = pixel * pixel_step + (group * weighted + w) * map_step
        z = tl.load(logits + image * (count * pixels) + place, mask=mapped, other=0.0)
        z = z.to(tl.float32)
        if sigmoid:
            z = tl.sigmoid(z)
        maps = maps + (z,)

    size: tl.constexpr = channels * pixels
    total = tl.zeros([pixel_block, channel_block], tl.float32)
    for t in tl.static_range(terms):
        term = group * terms + t
        factor = tl.load(mix_bias + term, mask=group < groups, other=0.0)
        for w in tl.static_range(weighted):
            factor += tl.load(mix + term * weighted + w, mask=group < groups, other=0.0) * maps[w]
        if t == 0:
            source = x + image * size
        else:
            source = lows + ((t - 1) * tl.num_programs(0) + image) * size
        total += factor * tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + image * size + at, total.to(y.dtype.element_ty), mask=inside)


@triton.constexpr_function
def _total(columns, bands):
    """Columns of the first bands."""
    return sum(columns[:bands])


@triton.jit
def _place(row, pixel, channel, channels: tl.constexpr, height: tl.constexpr,
           width: tl.constexpr, channels_last: tl.constexpr):  # fmt: skip
    if channels_last:
        return (row * width + pixel) * channels + channel
    return channel * (height * width) + row * width + pixel


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
    channels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    count: tl.constexpr,
    shares: tl.constexpr,  # places of a window times maps; 0 where logits are made elsewhere
    channel_block: tl.constexpr,
    count_block: tl.constexpr,
    pixel_block: tl.constexpr,
    share_pad: tl.constexpr,
    channels_last: tl.constexpr,
    dependent: tl.constexpr,
):
    """Grid: (B, rows · blocks of frequencies, blocks of channels)."""
    image = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (count + count_block - 1) // count_block
    row = tl.program_id(1) // blocks
    place = tl.program_id(1) % blocks * count_block + tl.arange(0, count_block)
    channel = tl.program_id(2) * channel_block + tl.arange(0, channel_block)
    share = tl.arange(0, share_pad)
    if shares > 0:
        weight = tl.load(
            windows + share[None, :] * channels + channel[:, None],
            mask=(share < shares)[None, :] & (channel < channels)[:, None], other=0.0,
        )  # fmt: skip
        given += (image * tl.num_programs(2) + tl.program_id(2)) * (shares * height * width)
    begin(dependent)
    x += image * (channels * height * width)
    total = tl.zeros([count_block, channel_block], tl.float32)
    for first in range(0, width, pixel_block):
        pixel = first + tl.arange(0, pixel_block)
        matrix = tl.load(
            to_columns + pixel[None, :] * count + place[:, None],
            mask=(pixel < width)[None, :] & (place < count)[:, None], other=0.0,
        )  # fmt: skip
        seen = tl.load(
            x + _place(row, pixel[:, None], channel[None, :], channels, height, width,
                       channels_last),
            mask=(pixel < width)[:, None] & (channel < channels)[None, :], other=0.0,
        )  # fmt: skip
        total = _product(total, matrix, seen)
        if shares > 0:
            part = _product(tl.zeros([pixel_block, share_pad], tl.float32), seen, weight)
            at = share[None, :] * (height * width) + row * width + pixel[:, None]
            mask = (pixel < width)[:, None] & (share < shares)[None, :]
            # Of the programs that see these pixels, one for each block of frequencies.
            tl.store(given + at, part, mask=mask & (tl.program_id(1) % blocks == 0))
    at = ((image * height + row) * count + place[:, None]) * channels + channel[None, :]
    mask = (place < count)[:, None] & (channel < channels)[None, :]
    tl.store(projected + at, total.to(projected.dtype.element_ty), mask=mask)


@triton.jit
def _add_windows(
    given, logits, program,
    parts: tl.constexpr, height: tl.constexpr, width: tl.constexpr, window: tl.constexpr,
    maps: tl.constexpr, part_pad: tl.constexpr, pixel_block: tl.constexpr,
    channels_last: tl.constexpr,
):  # fmt: skip
    """Logits of the program-th block of pixels: over ``parts`` places of all blocks of channels.

    given, logits: the image's.
    """
    pixels: tl.constexpr = height * width
    pixel = program * pixel_block + tl.arange(0, pixel_block)
    part = tl.arange(0, part_pad)
    place = part % (window * window)
    down, right = place // window - window // 2, place % window - window // 2
    y = (pixel // width)[None, :] + down[:, None]
    x = (pixel % width)[None, :] + right[:, None]
    inside = (part < parts)[:, None] & (pixel < pixels)[None, :]
    inside &= (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = (part * (maps * pixels))[:, None] + y * width + x
    for w in tl.static_range(maps):
        total = tl.sum(tl.load(given + w * pixels + at, mask=inside, other=0.0), 0)
        to = pixel * maps + w if channels_last else w * pixels + pixel
        tl.store(logits + to, total.to(logits.dtype.element_ty), mask=pixel < pixels)


@triton.jit
def filter_columns_kernel(
    projected,  # (B, rows, count · channels)
    through,  # (bands, rows, rows), of the same type
    given,  # (B, parts, maps, height · width) float32 (maps > 0 only, else anything)
    logits,  # out: (B, maps, height, width), or channels last (maps > 0 only)
    filtered,  # out: (B, rows, sum(columns) · channels), of the same type
    channels: tl.constexpr,
    rows: tl.constexpr,
    count: tl.constexpr,  # columns of ``projected``
    columns: tl.constexpr,  # of each band, a tuple
    row_block: tl.constexpr,
    column_block: tl.constexpr,  # of (frequency, channel) pairs
    column_blocks: tl.constexpr,  # of all bands
    inner_block: tl.constexpr,
    maps: tl.constexpr,  # 0 where logits are made elsewhere
    parts: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    window: tl.constexpr,
    part_pad: tl.constexpr,
    pixel_block: tl.constexpr,
    channels_last: tl.constexpr,  # of logits
    dependent: tl.constexpr,
):
    """Grid: (B, blocks of rows, blocks of columns, band after band, and then of pixels).

    As many blocks of pixels on the third axis as on both hold all of them.
    """
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(2)
    begin(dependent)
    if block < column_blocks:
        projected += image * (rows * count * channels)
        filtered += image * (rows * _total(columns, len(columns)) * channels)
        _filter(
            projected, through, filtered, tl.program_id(1), block,
            channels, rows, count, columns, row_block, column_block, inner_block,
        )  # fmt: skip
    else:
        if maps > 0:
            given += image * (parts * maps * height * width)
            logits += image * (maps * height * width)
            program = (block - column_blocks) * tl.num_programs(1) + tl.program_id(1)
            _add_windows(
                given, logits, program, parts, height, width, window, maps, part_pad,
                pixel_block, channels_last,
            )  # fmt: skip


@triton.jit
def _filter(
    projected, through, filtered, row_program, block,
    channels: tl.constexpr, rows: tl.constexpr, count: tl.constexpr, columns: tl.constexpr,
    row_block: tl.constexpr, column_block: tl.constexpr, inner_block: tl.constexpr,
):  # fmt: skip
    """One block of rows of one block of columns."""
    row = row_program * row_block + tl.arange(0, row_block)
    # Which band's block this is, and how many blocks the bands before have.
    band = 0
    width = 0
    start = 0
    mine = 0
    before = 0
    stored: tl.constexpr = _total(columns, len(columns)) * channels
    for b in tl.static_range(len(columns)):
        after = before + (columns[b] * channels + column_block - 1) // column_block
        here = (block >= before) & (block < after)
        band += tl.where(here, b, 0)
        width += tl.where(here, columns[b] * channels, 0)
        start += tl.where(here, _total(columns, b) * channels, 0)
        mine += tl.where(here, block - before, 0)
        before = after
    column = mine * column_block + tl.arange(0, column_block)
    through += band * (rows * rows)
    total = tl.zeros([row_block, column_block], tl.float32)
    for first in range(0, rows, inner_block):
        inner = first + tl.arange(0, inner_block)
        matrix = tl.load(
            through + row[:, None] * rows + inner[None, :],
            mask=(row < rows)[:, None] & (inner < rows)[None, :], other=0.0,
        )  # fmt: skip
        seen = tl.load(
            projected + inner[:, None] * (count * channels) + column[None, :],
            mask=(inner < rows)[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        total = _product(total, matrix, seen)
    at = row[:, None] * stored + start + column[None, :]
    mask = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(filtered + at, total.to(filtered.dtype.element_ty), mask=mask)


@triton.jit
def _maps(
    logits, shift, place, group, mapped, step, count: tl.constexpr, weighted: tl.constexpr,
    biased: tl.constexpr, sigmoid: tl.constexpr,
):  # fmt: skip
    """The ``weighted`` maps of a group at some pixels, a tuple."""
    maps = ()
    for w in tl.static_range(weighted):
        z = tl.load(logits + place + (group * weighted + w) * step, mask=mapped, other=0.0)
        z = z.to(tl.float32)
        if biased:
            z += tl.load(shift + group * weighted + w, mask=group * weighted < count, other=0.0)
        if sigmoid:
            z = tl.sigmoid(z)
        maps = maps + (z,)
    return maps


@triton.jit
def _factor(
    maps, mix, mix_bias, term, inside,
):  # fmt: skip
    factor = tl.load(mix_bias + term, mask=inside, other=0.0)
    for w in tl.static_range(len(maps)):
        factor += tl.load(mix + term * len(maps) + w, mask=inside, other=0.0) * maps[w]
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
    channels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    parts: tl.constexpr,  # 2 where rows are complex
    columns: tl.constexpr,  # of each band, a tuple
    groups: tl.constexpr,
    weighted: tl.constexpr,
    pixel_block: tl.constexpr,
    channel_block: tl.constexpr,
    inner_block: tl.constexpr,
    biased: tl.constexpr,
    sigmoid: tl.constexpr,
    channels_last: tl.constexpr,
    dependent: tl.constexpr,
):
    """Grid: (B, rows · blocks of pixels, blocks of channels)."""
    image = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (width + pixel_block - 1) // pixel_block
    row = tl.program_id(1) // blocks
    pixel = tl.program_id(1) % blocks * pixel_block + tl.arange(0, pixel_block)
    channel = tl.program_id(2) * channel_block + tl.arange(0, channel_block)
    inside = (pixel < width)[:, None] & (channel < channels)[None, :]
    count: tl.constexpr = groups * weighted
    terms: tl.constexpr = len(columns) + 1
    begin(dependent)
    x += image * (channels * height * width)
    y += image * (channels * height * width)
    logits += image * (count * height * width)
    if groups == 1:
        group = tl.zeros([1, 1], tl.int32)
        mapped = (pixel < width)[:, None]
    else:
        group = (channel // (channels // groups))[None, :]
        mapped = inside
    step: tl.constexpr = 1 if channels_last else height * width
    flat = row * width + pixel[:, None]
    if channels_last:
        flat *= count
    maps = _maps(logits, shift, flat, group, mapped, step, count, weighted, biased, sigmoid)

    at = _place(row, pixel[:, None], channel[None, :], channels, height, width, channels_last)
    grouped = group < groups
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    total *= _factor(maps, mix, mix_bias, group * terms, grouped)
    stored: tl.constexpr = _total(columns, len(columns))
    filtered += (image * height + row) * (parts * stored * channels)
    for b in tl.static_range(len(columns)):
        low = tl.zeros([pixel_block, channel_block], tl.float32)
        start = _total(columns, b)
        for first in range(0, parts * columns[b], inner_block):
            inner = first + tl.arange(0, inner_block)
            kept = inner < parts * columns[b]
            matrix = tl.load(
                from_columns + (parts * start + inner)[None, :] * width + pixel[:, None],
                mask=kept[None, :] & (pixel < width)[:, None], other=0.0,
            )  # fmt: skip
            place = inner // columns[b] * stored + start + inner % columns[b]
            seen = tl.load(
                filtered + place[:, None] * channels + channel[None, :],
                mask=kept[:, None] & (channel < channels)[None, :], other=0.0,
            )  # fmt: skip
            low = _product(low, matrix, seen)
        total += low * _factor(maps, mix, mix_bias, group * terms + b + 1, grouped)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
