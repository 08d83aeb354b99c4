"""``torch.ops.fdconv.assemble_kernels``: the two assembly kernels as a PyTorch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.attention.launch import Pooling
from fdconv_deploy.ops.attention.torch_op import attentions, gate_sizes
from fdconv_deploy.ops.frequency_assembly import kernels
from fdconv_deploy.ops.frequency_assembly.launch import (
    AssemblySizes,
    attend_rows_launch,
    column_launch,
    half_shape,
    row_launch,
)
from fdconv_deploy.ops.launch import require_device, run_kernel


@torch.library.custom_op("fdconv::assemble_kernels", mutates_args=())
def assemble_kernels(
    gates: Tensor,
    average: Tensor | None,
    values: Tensor,
    groups: Tensor,
    row_table: Tensor,
    column_table: Tensor,
    local_weight: Tensor | None,
    output_scale: Tensor | None,
    sizes: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """One kernel per image from its attentions.

    Args:
        gates: ``(B, heads)`` float32, all attentions after their activations.
        average: ``(B, I)`` float32, the normalised average, with local attention only.
        values, groups: a `KernelSpectrum`'s.
        row_table, column_table: ``(2, n)`` float32, of `launch.root_table`.
        local_weight: ``(R, kernel width · taps)`` float32, with local attention only.
        output_scale: ``(O,)`` float32, with a following BatchNorm only.
        sizes: `AssemblySizes.numbers`.
        dtype: of the result; arithmetic is float32.
        channels_last: the result's memory format.

    Returns:
        ``(B·O, I, kh, kw)``, the weight of a convolution of B groups. No gradients.

    Raises:
        BackendError: the tensors are not on a GPU (and Triton does not interpret).
    """
    require_device(gates, "fdconv::assemble_kernels")
    layer = AssemblySizes.of(sizes)
    gates = gates.contiguous()
    batch = gates.shape[0]
    half = torch.empty((batch, *half_shape(layer)), device=gates.device)
    run_kernel(kernels, row_launch(layer), batch, gates, values, groups, row_table, half)
    return _columns(
        half, gates, column_table, average, local_weight, output_scale, layer, dtype, channels_last
    )


def _columns(
    half: Tensor,
    gates: Tensor,
    column_table: Tensor,
    average: Tensor | None,
    local_weight: Tensor | None,
    output_scale: Tensor | None,
    layer: AssemblySizes,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    weight = _result(gates, layer, dtype, channels_last)
    columns = column_launch(layer, channels_last=channels_last, dtype=str(dtype).split(".")[1])
    # A pointer that a kernel never follows may point anywhere.
    run_kernel(
        kernels,
        columns,
        len(gates),
        half,
        gates,
        column_table,
        gates if average is None else average.contiguous(),
        gates if local_weight is None else local_weight,
        gates if output_scale is None else output_scale,
        weight,
    )
    return weight


def _result(gates: Tensor, layer: AssemblySizes, dtype: torch.dtype, last: bool) -> Tensor:
    return torch.empty(
        (gates.shape[0] * layer.out_channels, layer.in_channels, *layer.kernel_size),
        dtype=dtype,
        device=gates.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


@assemble_kernels.register_fake
def _(gates: Tensor, *rest: Any) -> Tensor:
    *_, sizes, dtype, channels_last = rest
    return _result(gates, AssemblySizes.of(sizes), dtype, channels_last)


@torch.library.custom_op("fdconv::attend_and_assemble", mutates_args=())
def attend_and_assemble(
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
    kernel: int,
    values: Tensor,
    groups: Tensor,
    row_table: Tensor,
    column_table: Tensor,
    local_weight: Tensor | None,
    output_scale: Tensor | None,
    sizes: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """`fdconv::attend`, with sigmoids, and `fdconv::assemble_kernels` in one kernel less.

    Args:
        partial, …, squared: as of `attend`.
        kernel: heads that weigh the spectrum, the first ones.
        values, …: as of `assemble_kernels`.

    Returns:
        As `assemble_kernels`.

    Raises:
        BackendError: the tensors are not on a GPU (and Triton does not interpret), or
            `attend_rows_launch` has no launch for these sizes.
    """
    require_device(partial, "fdconv::attend_and_assemble")
    layer, batch = AssemblySizes.of(sizes), len(partial)
    gates_of = gate_sizes(heads, norm_weight, norm_bias, average_weight, epsilons, squared, True)
    launch = attend_rows_launch(Pooling(*pooling), gates_of, kernel, layer)
    if launch is None:
        raise BackendError(
            "these attentions do not fit the kernel that weighs the spectrum. Use fdconv::attend "
            "and fdconv::assemble_kernels."
        )
    gates, average = attentions(partial, heads, pooling, average_weight is not None)
    half = torch.empty((batch, *half_shape(layer)), device=gates.device)

    def given(tensor: Tensor | None) -> Tensor:
        return heads if tensor is None else tensor

    run_kernel(
        kernels, launch, batch, partial, hidden_bias, given(norm_weight), given(norm_bias),
        heads, head_bias, given(average_weight), given(average_bias), values, groups, row_table,
        average, gates, half,
    )  # fmt: skip
    return _columns(
        half, gates, column_table, average, local_weight, output_scale, layer, dtype, channels_last
    )


@attend_and_assemble.register_fake
def _(partial: Tensor, *rest: Any) -> Tensor:
    *_, sizes, dtype, channels_last = rest
    return _result(partial, AssemblySizes.of(sizes), dtype, channels_last)
