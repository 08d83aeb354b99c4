"""``torch.ops.fdconv``: the kernels as PyTorch operators, without gradients.

All raise `BackendError` where their tensors are not on a GPU (and Triton does not interpret).
Constants go in lists, in the order that the kernels take them in:

    attention   hidden_bias, norm_weight, norm_bias  (A,) float32: a norm of the hidden layer, by
                                                     mean and variance, or by the mean square
                                                     where it has no bias
                heads, head_bias                     (N, A), (N,) float32
                average_weight, average_bias         (I,) float32: the local attention's LayerNorm
    spectrum    values, groups                       of a `KernelSpectrum`
                row_table, column_table              (2, n) float32, of `root_table`
                local_weight                         (R, kernel width · taps) float32
                output_scale                         (O,) float32, of a following BatchNorm
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.attention.launch import (
    GateSizes,
    Pooling,
    finish_launch,
    gates_launch,
    pool_launch,
)
from fdconv_deploy.ops.frequency_assembly.launch import (
    AssemblySizes,
    attend_rows_launch,
    column_launch,
    half_shape,
    row_launch,
)
from fdconv_deploy.ops.frequency_band_modulation.launch import (
    BandSizes,
    filter_launch,
    modulate_launch,
    project_launch,
)
from fdconv_deploy.ops.launch import run_kernel

Constants = Sequence[Tensor | None]


def _memory(x: Tensor) -> tuple[bool, torch.memory_format]:
    """Whether channels are last in memory, and how PyTorch calls it."""
    last = not x.is_contiguous()
    return last, torch.channels_last if last else torch.contiguous_format


def _type(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[1]


def _pooled(x: Tensor, hidden: Tensor | None) -> tuple[Pooling, Tensor]:
    """How ``x`` (B, I, H, W) is pooled for a hidden layer (A, I), and empty parts."""
    units = 0 if hidden is None else len(hidden)
    pooling = Pooling(x.shape[1], x.shape[2] * x.shape[3], units)
    shape = (0,) if hidden is None else (len(x), pooling.splits, pooling.stride)
    return pooling, torch.empty(shape, device=x.device, dtype=torch.float32)


@torch.library.custom_op("fdconv::pool", mutates_args=())
def pool(x: Tensor, hidden: Tensor) -> Tensor:
    """Parts of an input's average and of its hidden layer, see `attend`.

    Args:
        x: ``(B, I, H, W)``, contiguous or in channels-last memory format.
        hidden: ``(A, I)`` float32.

    Returns:
        ``(B, splits, …)`` float32, see `Pooling`.
    """
    pooling, partial = _pooled(x, hidden)
    run_kernel(pool_launch(pooling, _memory(x)[0], _type(x.dtype)), x, hidden, partial)
    return partial


@torch.library.custom_op("fdconv::finish_convolution", mutates_args=("y",))
def finish_convolution(
    y: Tensor, bias: Tensor | None, shortcut: Tensor | None, hidden: Tensor | None, relu: bool
) -> Tensor:
    """Bias, shortcut and ReLU of a convolution in place, and `pool` of the outcome.

    Args:
        y: ``(B, O, H, W)``, contiguous or in channels-last memory format.
        bias: ``(O,)`` float32. shortcut: as y. hidden: ``(A, O)`` float32, of the layer that
            reads the outcome.
        relu: whether negative values become 0.

    Returns:
        As `pool`; nothing, ``(0,)``, without ``hidden``.
    """
    pooling, partial = _pooled(y, hidden)
    last, memory = _memory(y)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=memory)
    launch = finish_launch(
        pooling, last, _type(y.dtype), biased=bias is not None, added=shortcut is not None,
        relu=relu, pooled=hidden is not None,
    )  # fmt: skip
    run_kernel(launch, y, bias, shortcut, hidden, partial, y)
    return partial


@pool.register_fake
def _(x: Tensor, hidden: Tensor) -> Tensor:
    return _pooled(x, hidden)[1]


@finish_convolution.register_fake
def _(y: Tensor, _bias: Any, _shortcut: Any, hidden: Tensor | None, _relu: bool) -> Tensor:
    return _pooled(y, hidden)[1]


def _attentions(partial: Tensor, attention: Constants, channels: int) -> tuple[Tensor, Tensor]:
    """Empty gates (B, N) and average (B, I), which is empty without a LayerNorm."""
    *_, heads, _, weight, _ = attention
    assert heads is not None
    gates = partial.new_empty((len(partial), len(heads)))
    return gates, partial.new_empty((0,) if weight is None else (len(partial), channels))


def _gate_sizes(
    attention: Constants, epsilons: list[float], squared: bool, sigmoid: bool
) -> GateSizes:
    _, norm_weight, norm_bias, heads, _, average_weight, _ = attention
    assert heads is not None
    return GateSizes(
        len(heads), norm_weight is not None, norm_bias is not None, epsilons[0], squared, sigmoid,
        average_weight is not None, epsilons[1],
    )  # fmt: skip


@torch.library.custom_op("fdconv::attend", mutates_args=())
def attend(
    partial: Tensor,
    attention: Sequence[Tensor | None],
    pooling: list[int],
    epsilons: list[float],
    squared: bool,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    """All attentions of a layer from its pooled input, and the normalised average.

    Args:
        partial: what `pool` or `finish_convolution` gave.
        attention: constants, see above.
        pooling: channels, pixels and units of a `Pooling`.
        epsilons: of the hidden layer's norm and of the average's.
        squared: whether the hidden layer's activation is squared.
        sigmoid: whether the attentions get theirs here.

    Returns:
        ``(B, N)`` and ``(B, I)`` float32, the second empty without a LayerNorm.
    """
    gates, average = _attentions(partial, attention, pooling[0])
    sizes = _gate_sizes(attention, epsilons, squared, sigmoid)
    run_kernel(gates_launch(Pooling(*pooling), sizes), partial, *attention, average, gates)
    return gates, average


@attend.register_fake
def _(partial: Tensor, attention: Constants, pooling: Any, *_: Any) -> tuple[Tensor, Tensor]:
    return _attentions(partial, attention, pooling[0])


def _weight(given: Tensor, layer: AssemblySizes, dtype: torch.dtype, last: bool) -> Tensor:
    """An empty result of either assembly."""
    return torch.empty(
        (len(given) * layer.out_channels, layer.in_channels, *layer.kernel_size),
        dtype=dtype,
        device=given.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _half(given: Tensor, layer: AssemblySizes) -> Tensor:
    return given.new_empty((len(given), *half_shape(layer)))


@torch.library.custom_op("fdconv::assemble_kernels", mutates_args=())
def assemble_kernels(
    gates: Tensor,
    average: Tensor | None,
    spectrum: Sequence[Tensor | None],
    sizes: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """One kernel per image from its attentions.

    Args:
        gates: ``(B, heads)`` float32, all attentions after their activations.
        average: ``(B, I)`` float32, the normalised average, with local attention only.
        spectrum: constants, see above.
        sizes: `AssemblySizes.numbers`.
        dtype: of the result; arithmetic is float32.
        channels_last: the result's memory format.

    Returns:
        ``(B·O, I, kh, kw)``, the weight of a convolution of B groups.
    """
    layer, gates = AssemblySizes.of(sizes), gates.contiguous()
    half = _half(gates, layer)
    run_kernel(row_launch(layer), gates, *spectrum[:3], half)
    average = None if average is None else average.contiguous()
    return _columns(half, gates, average, spectrum, layer, dtype, channels_last)


def _columns(
    half: Tensor,
    gates: Tensor,
    average: Tensor | None,
    spectrum: Constants,
    layer: AssemblySizes,
    dtype: torch.dtype,
    last: bool,
) -> Tensor:
    weight = _weight(gates, layer, dtype, last)
    launch = column_launch(layer, channels_last=last, dtype=_type(dtype))
    table, local_weight, output_scale = spectrum[3:]
    run_kernel(launch, half, gates, table, average, local_weight, output_scale, weight)
    return weight


@torch.library.custom_op("fdconv::attend_and_assemble", mutates_args=())
def attend_and_assemble(
    partial: Tensor,
    attention: Sequence[Tensor | None],
    pooling: list[int],
    epsilons: list[float],
    squared: bool,
    kernel: int,
    spectrum: Sequence[Tensor | None],
    sizes: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """`attend`, with sigmoids, and `assemble_kernels` in one kernel less.

    Args:
        partial, …, squared: as of `attend`.
        kernel: heads that weigh the spectrum, the first ones.
        spectrum, …: as of `assemble_kernels`.

    Returns:
        As `assemble_kernels`.

    Raises:
        BackendError: `attend_rows_launch` has no launch for these sizes, too.
    """
    layer = AssemblySizes.of(sizes)
    gates_of = _gate_sizes(attention, epsilons, squared, True)
    launch = attend_rows_launch(Pooling(*pooling), gates_of, kernel, layer)
    if launch is None:
        raise BackendError(
            "these attentions do not fit the kernel that weighs the spectrum. Use fdconv::attend "
            "and fdconv::assemble_kernels."
        )
    gates, average = _attentions(partial, attention, pooling[0])
    half = _half(partial, layer)
    run_kernel(launch, partial, *attention, *spectrum[:3], average, gates, half)
    return _columns(half, gates, average, spectrum, layer, dtype, channels_last)


@assemble_kernels.register_fake
@attend_and_assemble.register_fake
def _(given: Tensor, *rest: Any) -> Tensor:
    *_, sizes, dtype, last = rest
    return _weight(given, AssemblySizes.of(sizes), dtype, last)


@torch.library.custom_op("fdconv::modulate_bands", mutates_args=())
def modulate_bands(
    x: Tensor,
    logits: Tensor | None,
    windows: Tensor | None,
    shift: Tensor | None,
    mix: Tensor,
    mix_bias: Tensor,
    to_columns: Tensor,
    through: Tensor,
    from_columns: Tensor,
    columns: list[int],
    sigmoid: bool,
) -> Tensor:
    """Each band of an input weighted by its own map.

    Args:
        x: ``(B, I, H, W)``, contiguous, or with ``logits`` in channels-last memory format.
        logits: ``(B, g·weighted, H, W)``, of x's type: the maps before the sigmoid, or, where
            ``sigmoid`` is not set, after whatever made them. None: they are made here.
        windows: ``(s, s, weighted, I)`` of x's type, the convolution that makes them (`g` is 1).
        shift: ``(g·weighted,)`` float32, added to the logits.
        mix, mix_bias: ``(g·terms, weighted)`` and ``(g·terms,)`` float32.
        to_columns: ``(W, n)`` of x's type, the projection of a row of pixels.
        through: ``(bands, H', H')`` of x's type, each band's low-pass along the columns of pixels;
            H' is H, or 2·H where the n numbers of a row are real parts and then imaginary ones.
        from_columns: ``(m, W)`` of x's type, band after band.
        columns: of the projection's columns, how many each band keeps.

    Returns:
        As x; the sum is float32.
    """
    batch, channels, height, width = x.shape
    last, memory = _memory(x)
    x = x.contiguous(memory_format=memory)
    sizes = BandSizes(
        channels, height, width, to_columns.shape[1], through.shape[1] // height, tuple(columns),
        len(mix) // (len(columns) + 1), mix.shape[1], 0 if windows is None else len(windows),
    )  # fmt: skip
    dtype = _type(x.dtype)
    projected = x.new_empty((batch, height, sizes.count, channels))
    filtered = x.new_empty((batch, sizes.rows, sizes.stored, channels))
    y = torch.empty_like(x, memory_format=memory)
    given = mix  # any float32: no kernel follows it
    if logits is None:
        shape = batch, sizes.channel_blocks, sizes.shares, height * width
        given = x.new_empty(shape, dtype=torch.float32)
        shape = batch, sizes.maps, height, width
        logits = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory)
    else:
        logits = logits.contiguous(memory_format=memory)
    run_kernel(project_launch(sizes, last, dtype), x, to_columns, windows, given, projected)
    run_kernel(filter_launch(sizes, last, dtype), projected, through, given, logits, filtered)
    launch = modulate_launch(sizes, last, dtype, biased=shift is not None, sigmoid=sigmoid)
    run_kernel(launch, x, logits, shift, mix, mix_bias, filtered, from_columns, y)
    return y


@modulate_bands.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=_memory(x)[1])
