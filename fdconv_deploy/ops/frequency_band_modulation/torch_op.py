"""``torch.ops.fdconv.combine_bands``: the combination kernel as a PyTorch operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdconv_deploy.ops.frequency_band_modulation import kernel
from fdconv_deploy.ops.frequency_band_modulation.launch import combination_launch
from fdconv_deploy.ops.launch import require_device, run_kernel


@torch.library.custom_op("fdconv::combine_bands", mutates_args=())
def combine_bands(
    x: Tensor, logits: Tensor, mix: Tensor, mix_bias: Tensor, lows: Tensor, sigmoid: bool
) -> Tensor:
    """Each band of an input weighted by its own map.

    Args:
        x: ``(B, I, H, W)``, contiguous, or with ``logits`` in channels-last memory format.
        logits: ``(B, g·weighted, H, W)``, of x's type: the maps before the sigmoid, or, where
            ``sigmoid`` is not set, after whatever made them.
        mix, mix_bias: ``(g·terms, weighted)`` and ``(g·terms,)`` float32.
        lows: ``(terms - 1, B, …)``: the low-passes, each laid out in memory as x.

    Returns:
        As x; the sum is float32. No gradients.

    Raises:
        BackendError: the tensors are not on a GPU (and Triton does not interpret).
    """
    require_device(x, "fdconv::combine_bands")
    batch, channels, height, width = x.shape
    last = not x.is_contiguous()
    memory = torch.channels_last if last else torch.contiguous_format
    logits = logits.contiguous(memory_format=memory)
    terms = len(lows) + 1
    launch = combination_launch(
        channels=channels,
        pixels=height * width,
        groups=len(mix) // terms,
        weighted=mix.shape[1],
        terms=terms,
        sigmoid=sigmoid,
        channels_last=last,
        dtype=str(x.dtype).split(".")[1],
    )
    x = x.contiguous(memory_format=memory)
    y = torch.empty_like(x, memory_format=memory)
    run_kernel(kernel, launch, batch, x, logits, mix, mix_bias, lows, y)
    return y


@combine_bands.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(x)
