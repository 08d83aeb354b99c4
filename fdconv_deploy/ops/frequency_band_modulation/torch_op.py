"""``torch.ops.fdconv.modulate_bands``: the band modulation's kernels as a PyTorch operator."""

from __future__ import annotations

import torch
from torch import Tensor

from fdconv_deploy.ops.frequency_band_modulation import kernel
from fdconv_deploy.ops.frequency_band_modulation.launch import (
    BandSizes,
    filter_launch,
    modulate_launch,
    project_launch,
)
from fdconv_deploy.ops.launch import require_device, run_kernel


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
        As x; the sum is float32. No gradients.

    Raises:
        BackendError: the tensors are not on a GPU (and Triton does not interpret).
    """
    require_device(x, "fdconv::modulate_bands")
    batch, channels, height, width = x.shape
    last = not x.is_contiguous()
    memory = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=memory)
    terms = len(columns) + 1
    sizes = BandSizes(
        channels,
        height,
        width,
        to_columns.shape[1],
        through.shape[1] // height,
        tuple(columns),
        len(mix) // terms,
        mix.shape[1],
        0 if windows is None else len(windows),
    )
    dtype = str(x.dtype).split(".")[1]
    projected = x.new_empty((batch, height, sizes.count, channels))
    filtered = x.new_empty((batch, sizes.rows, sizes.stored, channels))
    y = torch.empty_like(x, memory_format=memory)
    # A pointer that a kernel never follows may point anywhere.
    given = mix
    if logits is None:
        given = x.new_empty(
            (batch, sizes.channel_blocks, sizes.shares, height * width), dtype=torch.float32
        )
        shape = batch, sizes.maps, height, width
        logits = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory)
    else:
        logits = logits.contiguous(memory_format=memory)
    launch = project_launch(sizes, last, dtype)
    run_kernel(
        kernel, launch, batch, x, to_columns, x if windows is None else windows, given, projected
    )
    launch = filter_launch(sizes, last, dtype)
    run_kernel(kernel, launch, batch, projected, through, given, logits, filtered)
    launch = modulate_launch(sizes, last, dtype, biased=shift is not None, sigmoid=sigmoid)
    added = mix if shift is None else shift
    run_kernel(kernel, launch, batch, x, logits, added, mix, mix_bias, filtered, from_columns, y)
    return y


@modulate_bands.register_fake
def _(
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
    memory = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty_like(x, memory_format=memory)
