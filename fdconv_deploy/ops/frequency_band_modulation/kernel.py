"""The bands' weighted sum, in one pass: y = sum over terms t of factor[t] ∘ low[t].

low[0] is the input, the others its low-passes; factor = mix · act(logits) + mix_bias. The
matrix products that make the low-passes, and the convolution that makes the logits, are left
to libraries.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl


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
):
    """Grid: (B, blocks of pixels, blocks of channels)."""
    image = tl.program_id(0).to(tl.int64)
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
