"""The kernels of the attentions: pooling (with a convolution's end, or alone) and gates.

Every kernel's last argument is the constants of its `KernelLaunch`, which it reads as attributes.
"""

# mypy: ignore-errors
import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def begin(c: tl.constexpr):
    """Wait for what earlier kernels wrote, and let the next kernel start (sm_90 and newer).

    Constants may be read before. The next kernel waits here in its turn, so it may start at once.
    """
    if c.dependent:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def feature_place(pixel, channel, channels: tl.constexpr, pixels: tl.constexpr, c: tl.constexpr):
    """Where in a map a channel's pixel lies."""
    if c.channels_last:
        return pixel * channels + channel
    return channel * pixels + pixel


@triton.jit
def _store_partial(total, channel, hidden_weight, partial, image, block, split, c: tl.constexpr):
    """One program's part of the average and of the hidden layer.

    total: ``(pixel_block, channel_block)``, what it added up of ``channel``, the block-th of
    ``blocks``. partial: ``(B, splits, blocks · units + channels)``.
    """
    total = tl.sum(total, 0) * (1.0 / c.pixels)
    inside = channel < c.channels
    partial += image * tl.num_programs(2) * c.stride
    row = partial + split * c.stride
    tl.store(row + c.blocks * c.units + channel, total, mask=inside)
    for first in range(0, c.units, c.unit_block):
        unit = first + tl.arange(0, c.unit_block)
        mask = (unit < c.units)[:, None] & inside[None, :]
        at = hidden_weight + unit[:, None] * c.channels + channel[None, :]
        weight = tl.load(at, mask=mask, other=0.0)
        share = tl.sum(weight * total[None, :], 1)
        tl.store(row + block * c.units + unit, share, mask=unit < c.units)


@triton.jit
def pool_kernel(
    x,  # (B, channels, pixels), or (B, pixels, channels) channels last
    hidden_weight,  # (units, channels) float32
    partial,  # out: (B, splits, blocks · units + channels) float32
    c: tl.constexpr,  # steps: tiles of pixels per program
):
    """Grid: (B, blocks of channels, splits of pixels)."""
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    split = tl.program_id(2)
    begin(c)
    channel = block * c.channel_block + tl.arange(0, c.channel_block)
    x += image * (c.channels * c.pixels)
    total = tl.zeros([c.pixel_block, c.channel_block], tl.float32)
    for step in range(c.steps):
        pixel = (split * c.steps + step) * c.pixel_block + tl.arange(0, c.pixel_block)
        mask = (pixel < c.pixels)[:, None] & (channel < c.channels)[None, :]
        at = feature_place(pixel[:, None], channel[None, :], c.channels, c.pixels, c)
        total += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    _store_partial(total, channel, hidden_weight, partial, image, block, split, c)


@triton.jit
def finish_kernel(
    x,  # as of pool_kernel: what a convolution gave
    bias,  # (channels,) float32 (biased only, else anything)
    shortcut,  # as x (added only)
    hidden_weight,  # (units, channels) float32 (pooled only)
    partial,  # out, pooled only: as of pool_kernel
    y,  # out: as x, and may be x
    c: tl.constexpr,
):
    """Y = relu(x + bias + shortcut), and the average of y. Grid: as of pool_kernel."""
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    split = tl.program_id(2)
    channel = block * c.channel_block + tl.arange(0, c.channel_block)
    moved = tl.zeros([c.channel_block], tl.float32)
    if c.biased:
        moved = tl.load(bias + channel, mask=channel < c.channels, other=0.0)
    begin(c)
    x += image * (c.channels * c.pixels)
    shortcut += image * (c.channels * c.pixels)
    y += image * (c.channels * c.pixels)
    total = tl.zeros([c.pixel_block, c.channel_block], tl.float32)
    for step in range(c.steps):
        pixel = (split * c.steps + step) * c.pixel_block + tl.arange(0, c.pixel_block)
        mask = (pixel < c.pixels)[:, None] & (channel < c.channels)[None, :]
        at = feature_place(pixel[:, None], channel[None, :], c.channels, c.pixels, c)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + moved[None, :]
        if c.added:
            value += tl.load(shortcut + at, mask=mask, other=0.0).to(tl.float32)
        if c.relu:
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        rounded = value.to(y.dtype.element_ty)
        tl.store(y + at, rounded, mask=mask)
        if c.pooled:
            # What the next layer reads is what it would pool.
            total += tl.where(mask, rounded.to(tl.float32), 0.0)
    if c.pooled:
        _store_partial(total, channel, hidden_weight, partial, image, block, split, c)


@triton.jit
def hidden_layer(partial, bias, norm_weight, norm_bias, c: tl.constexpr):
    """The hidden layer after its activation, ``(unit_pad,)``, zeros past the last unit.

    partial: the image's. normed, centred: the norm, if any, takes the mean off first.
    """
    unit = tl.arange(0, c.unit_pad)
    inside = unit < c.units
    total = tl.zeros([c.part_block, c.unit_pad], tl.float32)
    for first in range(0, c.splits * c.blocks, c.part_block):
        part = first + tl.arange(0, c.part_block)
        row = part // c.blocks * c.stride + part % c.blocks * c.units
        mask = (part < c.splits * c.blocks)[:, None] & inside[None, :]
        total += tl.load(partial + row[:, None] + unit[None, :], mask=mask, other=0.0)
    z = tl.sum(total, 0) + tl.load(bias + unit, mask=inside, other=0.0)
    if c.normed:
        if c.centred:
            z = tl.where(inside, z - tl.sum(z, 0) / c.units, 0.0)
        z *= tl.rsqrt(tl.sum(z * z, 0) / c.units + c.epsilon)
        z *= tl.load(norm_weight + unit, mask=inside, other=0.0)
        if c.centred:
            z += tl.load(norm_bias + unit, mask=inside, other=0.0)
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if c.squared:
        z *= z
    return z


@triton.jit
def load_heads(heads, head_bias, head, unit, stop, c: tl.constexpr):
    """Weights and biases of the heads before ``stop``."""
    mask = (head < stop)[:, None] & (unit < c.units)[None, :]
    weight = tl.load(heads + head[:, None] * c.units + unit[None, :], mask=mask, other=0.0)
    return weight, tl.load(head_bias + head, mask=head < stop, other=0.0)


@triton.jit
def normalise_average(partial, weight, bias, average, c: tl.constexpr):
    """LayerNorm of the average into ``average``, both the image's."""
    channel = tl.arange(0, c.channel_pad)
    inside = channel < c.channels
    total = tl.zeros([c.split_block, c.channel_pad], tl.float32)
    for first in range(0, c.splits, c.split_block):
        split = first + tl.arange(0, c.split_block)
        row = partial + split[:, None] * c.stride
        at = row + c.blocks * c.units + channel[None, :]
        total += tl.load(at, mask=(split < c.splits)[:, None] & inside[None, :], other=0.0)
    mean = tl.sum(total, 0)
    mean = tl.where(inside, mean - tl.sum(mean, 0) / c.channels, 0.0)
    mean *= tl.rsqrt(tl.sum(mean * mean, 0) / c.channels + c.average_epsilon)
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
    c: tl.constexpr,
):
    """Grid: (B, blocks of heads, and one more program where ``averaged``: it normalises)."""
    image = tl.program_id(0)
    block = tl.program_id(1)
    partial += image.to(tl.int64) * (c.splits * c.stride)
    unit = tl.arange(0, c.unit_pad)
    if block * c.head_block < c.count:
        head = block * c.head_block + tl.arange(0, c.head_block)
        weight, moved = load_heads(heads, head_bias, head, unit, c.count, c)
        begin(c)
        z = hidden_layer(partial, hidden_bias, norm_weight, norm_bias, c)
        logit = tl.sum(weight * z[None, :], 1) + moved
        if c.sigmoid:
            logit = tl.sigmoid(logit)
        tl.store(gates + image * c.count + head, logit, mask=head < c.count)
    else:
        begin(c)
        average += image * c.channels
        normalise_average(partial, average_weight, average_bias, average, c)
