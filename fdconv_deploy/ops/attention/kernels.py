"""The kernels of the attentions: pooling (with a convolution's end, or alone) and gates."""

# mypy: ignore-errors
import triton
import triton.language as tl

from fdconv_deploy.ops.dependent_launch import begin


@triton.jit
def _places(pixel, channel, channels: tl.constexpr, pixels: tl.constexpr, last: tl.constexpr):
    if last:
        return pixel * channels + channel
    return channel * pixels + pixel


@triton.jit
def store_partial(
    total, channel, block, blocks: tl.constexpr, split, hidden_weight, partial,
    channels: tl.constexpr, units: tl.constexpr, unit_block: tl.constexpr,
):  # fmt: skip
    """One program's part of the average and of the hidden layer.

    total: ``(channel_block,)``, its share of the average of ``channel``, the block-th of
    ``blocks``. partial: the image's, of ``(splits, blocks · units + channels)``.
    """
    inside = channel < channels
    row = partial + split * (blocks * units + channels)
    tl.store(row + blocks * units + channel, total, mask=inside)
    for first in range(0, units, unit_block):
        unit = first + tl.arange(0, unit_block)
        mask = (unit < units)[:, None] & inside[None, :]
        at = hidden_weight + unit[:, None] * channels + channel[None, :]
        weight = tl.load(at, mask=mask, other=0.0)
        share = tl.sum(weight * total[None, :], 1)
        tl.store(row + block * units + unit, share, mask=unit < units)


@triton.jit
def pool_kernel(
    x,  # (B, channels, pixels), or (B, pixels, channels) channels last
    hidden_weight,  # (units, channels) float32
    partial,  # out: (B, splits, blocks · units + channels) float32
    channels: tl.constexpr,
    pixels: tl.constexpr,
    units: tl.constexpr,
    unit_block: tl.constexpr,
    pixel_block: tl.constexpr,
    channel_block: tl.constexpr,
    steps: tl.constexpr,  # tiles of pixels per program
    channels_last: tl.constexpr,
    dependent: tl.constexpr,
):
    """Grid: (B, blocks of channels, splits of pixels)."""
    image = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (channels + channel_block - 1) // channel_block
    block = tl.program_id(1)
    split = tl.program_id(2)
    begin(dependent)
    channel = block * channel_block + tl.arange(0, channel_block)
    x += image * (channels * pixels)
    total = tl.zeros([pixel_block, channel_block], tl.float32)
    for step in range(steps):
        pixel = (split * steps + step) * pixel_block + tl.arange(0, pixel_block)
        mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        at = _places(pixel[:, None], channel[None, :], channels, pixels, channels_last)
        total += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    partial += image * tl.num_programs(2) * (blocks * units + channels)
    store_partial(
        tl.sum(total, 0) * (1.0 / pixels), channel, block, blocks, split,
        hidden_weight, partial, channels, units, unit_block,
    )  # fmt: skip


@triton.jit
def finish_kernel(
    x,  # as of pool_kernel: what a convolution gave
    bias,  # (channels,) float32 (biased only, else anything)
    shortcut,  # as x (added only)
    hidden_weight,  # (units, channels) float32 (pooled only)
    partial,  # out, pooled only: as of pool_kernel
    y,  # out: as x, and may be x
    channels: tl.constexpr,
    pixels: tl.constexpr,
    units: tl.constexpr,
    unit_block: tl.constexpr,
    pixel_block: tl.constexpr,
    channel_block: tl.constexpr,
    steps: tl.constexpr,
    biased: tl.constexpr,
    added: tl.constexpr,
    relu: tl.constexpr,
    pooled: tl.constexpr,
    channels_last: tl.constexpr,
    dependent: tl.constexpr,
):
    """Y = relu(x + bias + shortcut), and the average of y. Grid: as of pool_kernel."""
    image = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (channels + channel_block - 1) // channel_block
    block = tl.program_id(1)
    split = tl.program_id(2)
    channel = block * channel_block + tl.arange(0, channel_block)
    moved = tl.zeros([channel_block], tl.float32)
    if biased:
        moved = tl.load(bias + channel, mask=channel < channels, other=0.0)
    begin(dependent)
    x += image * (channels * pixels)
    shortcut += image * (channels * pixels)
    y += image * (channels * pixels)
    total = tl.zeros([pixel_block, channel_block], tl.float32)
    for step in range(steps):
        pixel = (split * steps + step) * pixel_block + tl.arange(0, pixel_block)
        mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        at = _places(pixel[:, None], channel[None, :], channels, pixels, channels_last)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + moved[None, :]
        if added:
            value += tl.load(shortcut + at, mask=mask, other=0.0).to(tl.float32)
        if relu:
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        rounded = value.to(y.dtype.element_ty)
        tl.store(y + at, rounded, mask=mask)
        if pooled:
            # What the next layer reads is what it would pool.
            total += tl.where(mask, rounded.to(tl.float32), 0.0)
    if pooled:
        partial += image * tl.num_programs(2) * (blocks * units + channels)
        store_partial(
            tl.sum(total, 0) * (1.0 / pixels), channel, block, blocks, split,
            hidden_weight, partial, channels, units, unit_block,
        )  # fmt: skip


@triton.jit
def hidden_layer(
    partial, bias, norm_weight, norm_bias,
    splits: tl.constexpr, blocks: tl.constexpr, channels: tl.constexpr, units: tl.constexpr,
    unit_pad: tl.constexpr, part_block: tl.constexpr,
    normed: tl.constexpr, centred: tl.constexpr, epsilon: tl.constexpr, squared: tl.constexpr,
):  # fmt: skip
    """The hidden layer after its activation, ``(unit_pad,)``, zeros past the last unit."""
    unit = tl.arange(0, unit_pad)
    inside = unit < units
    total = tl.zeros([part_block, unit_pad], tl.float32)
    for first in range(0, splits * blocks, part_block):
        part = first + tl.arange(0, part_block)
        row = part // blocks * (blocks * units + channels) + part % blocks * units
        mask = (part < splits * blocks)[:, None] & inside[None, :]
        total += tl.load(partial + row[:, None] + unit[None, :], mask=mask, other=0.0)
    z = tl.sum(total, 0) + tl.load(bias + unit, mask=inside, other=0.0)
    if normed:
        if centred:
            z = tl.where(inside, z - tl.sum(z, 0) / units, 0.0)
        z *= tl.rsqrt(tl.sum(z * z, 0) / units + epsilon)
        z *= tl.load(norm_weight + unit, mask=inside, other=0.0)
        if centred:
            z += tl.load(norm_bias + unit, mask=inside, other=0.0)
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if squared:
        z *= z
    return z


@triton.jit
def normalise_average(
    partial, weight, bias, average,
    splits: tl.constexpr, blocks: tl.constexpr, channels: tl.constexpr,
    channel_pad: tl.constexpr, split_block: tl.constexpr, units: tl.constexpr,
    epsilon: tl.constexpr,
):  # fmt: skip
    """LayerNorm of the average into ``average``."""
    channel = tl.arange(0, channel_pad)
    inside = channel < channels
    total = tl.zeros([split_block, channel_pad], tl.float32)
    for first in range(0, splits, split_block):
        split = first + tl.arange(0, split_block)
        row = partial + split[:, None] * (blocks * units + channels)
        at = row + blocks * units + channel[None, :]
        total += tl.load(at, mask=(split < splits)[:, None] & inside[None, :], other=0.0)
    mean = tl.sum(total, 0)
    mean = tl.where(inside, mean - tl.sum(mean, 0) / channels, 0.0)
    mean *= tl.rsqrt(tl.sum(mean * mean, 0) / channels + epsilon)
    mean *= tl.load(weight + channel, mask=inside, other=0.0)
    mean += tl.load(bias + channel, mask=inside, other=0.0)
    tl.store(average + channel, mean, mask=inside)


@triton.jit
def gates_kernel(
    partial,  # (B, splits, blocks · units + channels) float32, see pool_kernel
    hidden_bias,  # (units,) float32
    norm_weight,  # (units,) float32 (normed only, else anything)
    norm_bias,  # (units,) float32 (centred only)
    heads,  # (count, units) float32
    head_bias,  # (count,) float32
    average_weight,  # (channels,) float32 (averaged only)
    average_bias,  # (channels,) float32 (averaged only)
    average,  # out: (B, channels) float32 (averaged only)
    gates,  # out: (B, count) float32
    splits: tl.constexpr,
    blocks: tl.constexpr,
    channels: tl.constexpr,
    channel_pad: tl.constexpr,
    split_block: tl.constexpr,
    units: tl.constexpr,
    unit_pad: tl.constexpr,
    part_block: tl.constexpr,
    count: tl.constexpr,
    head_block: tl.constexpr,
    normed: tl.constexpr,
    centred: tl.constexpr,  # the norm takes the mean off first
    epsilon: tl.constexpr,
    squared: tl.constexpr,
    sigmoid: tl.constexpr,
    averaged: tl.constexpr,
    average_epsilon: tl.constexpr,
    dependent: tl.constexpr,
):
    """Grid: (B, blocks of heads, and one more program where ``averaged``: it normalises)."""
    image = tl.program_id(0)
    block = tl.program_id(1)
    stride: tl.constexpr = blocks * units + channels
    partial += image.to(tl.int64) * (splits * stride)
    unit = tl.arange(0, unit_pad)
    if block * head_block < count:
        head = block * head_block + tl.arange(0, head_block)
        mask = (head < count)[:, None] & (unit < units)[None, :]
        weight = tl.load(heads + head[:, None] * units + unit[None, :], mask=mask, other=0.0)
        moved = tl.load(head_bias + head, mask=head < count, other=0.0)
        begin(dependent)
        z = hidden_layer(
            partial, hidden_bias, norm_weight, norm_bias, splits, blocks, channels, units,
            unit_pad, part_block, normed, centred, epsilon, squared,
        )  # fmt: skip
        logit = tl.sum(weight * z[None, :], 1) + moved
        if sigmoid:
            logit = tl.sigmoid(logit)
        tl.store(gates + image * count + head, logit, mask=head < count)
    else:
        begin(dependent)
        normalise_average(
            partial, average_weight, average_bias, average + image * channels,
            splits, blocks, channels, channel_pad, split_block, units, average_epsilon,
        )  # fmt: skip
