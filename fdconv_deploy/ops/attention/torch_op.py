"""``torch.ops.fdconv``: pool, finish_convolution and attend, the attentions' kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fdconv_deploy.ops.attention import kernels
from fdconv_deploy.ops.attention.launch import (
    GateSizes,
    Pooling,
    finish_launch,
    gates_launch,
    pool_launch,
)
from fdconv_deploy.ops.launch import require_device, run_kernel


def pooling_of(x: Tensor, hidden: Tensor | None) -> Pooling:
    """How an input ``(B, I, H, W)`` is pooled for a hidden layer ``(A, I)``."""
    return Pooling(x.shape[1], x.shape[2] * x.shape[3], 0 if hidden is None else len(hidden))


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _type(x: Tensor) -> str:
    return str(x.dtype).split(".")[1]


@torch.library.custom_op("fdconv::pool", mutates_args=())
def pool(x: Tensor, hidden: Tensor) -> Tensor:
    """Parts of an input's average and of its hidden layer, see `attend`.

    Args:
        x: ``(B, I, H, W)``, contiguous or in channels-last memory format.
        hidden: ``(A, I)`` float32.

    Returns:
        ``(B, splits, …)`` float32 of `Pooling.shape`.

    Raises:
        BackendError: x is not on a GPU (and Triton does not interpret).
    """
    require_device(x, "fdconv::pool")
    pooling = pooling_of(x, hidden)
    partial = torch.empty((len(x), *pooling.shape), device=x.device)
    run_kernel(kernels, pool_launch(pooling, _channels_last(x), _type(x)), len(x), x, hidden,
               partial)  # fmt: skip
    return partial


@pool.register_fake
def _(x: Tensor, hidden: Tensor) -> Tensor:
    shape = (len(x), *pooling_of(x, hidden).shape)
    return torch.empty(shape, device=x.device, dtype=torch.float32)


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
    require_device(y, "fdconv::finish_convolution")
    pooling = pooling_of(y, hidden)
    last = _channels_last(y)
    if shortcut is not None:
        memory = torch.channels_last if last else torch.contiguous_format
        shortcut = shortcut.contiguous(memory_format=memory)
    partial = _parts(y, hidden)
    launch = finish_launch(
        pooling, last, _type(y), biased=bias is not None, added=shortcut is not None, relu=relu,
        pooled=hidden is not None,
    )  # fmt: skip
    # A pointer that a kernel never follows may point anywhere.
    run_kernel(
        kernels, launch, len(y), y, partial if bias is None else bias,
        y if shortcut is None else shortcut, partial if hidden is None else hidden, partial, y,
    )  # fmt: skip
    return partial


def _parts(y: Tensor, hidden: Tensor | None) -> Tensor:
    shape = (0,) if hidden is None else (len(y), *pooling_of(y, hidden).shape)
    return torch.empty(shape, device=y.device, dtype=torch.float32)


@finish_convolution.register_fake
def _(
    y: Tensor, bias: Tensor | None, shortcut: Tensor | None, hidden: Tensor | None, relu: bool
) -> Tensor:
    return _parts(y, hidden)


@torch.library.custom_op("fdconv::attend", mutates_args=())
def attend(
    partial: Tensor,
    hidden_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    heads: Tensor,
    head_bias: Tensor,
    average_weight: Tensor | None,
    average_bias: Tensor | None,
    pooling: list[int],
    epsilons: list[float],
    squared: bool,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    """All attentions of a layer from its pooled input, and the normalised average.

    Args:
        partial: what `pool` or `finish_convolution` gave.
        hidden_bias, norm_weight, norm_bias: ``(A,)`` float32: a norm of the hidden layer, by mean
            and variance, or by the mean square where it has no bias.
        heads, head_bias: ``(N, A)``, ``(N,)`` float32.
        average_weight, average_bias: ``(I,)`` float32, of the local attention's LayerNorm.
        pooling: channels, pixels and units of a `Pooling`.
        epsilons: of the hidden layer's norm and of the average's.
        squared: whether the hidden layer's activation is squared.
        sigmoid: whether the attentions get theirs here.

    Returns:
        ``(B, N)`` and ``(B, I)`` float32, the second empty without a LayerNorm.
    """
    require_device(partial, "fdconv::attend")
    batch, local = len(partial), average_weight is not None
    gates, average = attentions(partial, heads, pooling, local)
    sizes = gate_sizes(heads, norm_weight, norm_bias, average_weight, epsilons, squared, sigmoid)

    def given(tensor: Tensor | None) -> Tensor:
        return heads if tensor is None else tensor

    run_kernel(
        kernels, gates_launch(Pooling(*pooling), sizes), batch, partial, hidden_bias,
        given(norm_weight), given(norm_bias), heads, head_bias, given(average_weight),
        given(average_bias), average, gates,
    )  # fmt: skip
    return gates, average


def gate_sizes(
    heads: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    average_weight: Tensor | None,
    epsilons: list[float],
    squared: bool,
    sigmoid: bool,
) -> GateSizes:
    """Sizes of the attentions that `attend` is given so."""
    return GateSizes(
        len(heads), norm_weight is not None, norm_bias is not None, epsilons[0], squared, sigmoid,
        average_weight is not None, epsilons[1],
    )  # fmt: skip


def attentions(
    partial: Tensor, heads: Tensor, pooling: list[int], local: bool
) -> tuple[Tensor, Tensor]:
    """Empty gates and average, of the shapes that `attend` gives."""
    batch = len(partial)
    return (
        partial.new_empty((batch, len(heads))),
        partial.new_empty((batch, pooling[0]) if local else (0,)),
    )


@attend.register_fake
def _(
    partial: Tensor,
    hidden_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    heads: Tensor,
    head_bias: Tensor,
    average_weight: Tensor | None,
    average_bias: Tensor | None,
    pooling: list[int],
    epsilons: list[float],
    squared: bool,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    return attentions(partial, heads, pooling, average_weight is not None)
