"""Weights of a plain network → the start of an FDConv network.

An FDConv layer stores its kernel as a half spectrum. Before training, that is the
transform of the plain layer's weights, as the published converter writes it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fdconv_deploy.errors import CheckpointError

# What FDConv and FDLinear replace: block and stem convolutions of a ResNet, and the two
# linear layers of a ViT block's feed-forward network. Shortcuts and heads stay plain.
_CONV = re.compile(r"(?:^|\.)(?:layer\d+\.\d+\.conv\d|stem\.\d+)\.weight$")
_LINEAR = re.compile(r"(?:^|\.)layers\.\d+\.ffn\.layers\.(?:0\.0|1)\.weight$")

# The published converter takes layers of 32 channels or more. (The published layer's own
# default is dynamic above 16: a layer between the two starts from random weights.)
PUBLISHED_THRESHOLD = 31


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    use_fdconv_if_c_gt: int = PUBLISHED_THRESHOLD,
    use_fdconv_if_k_in: Collection[int] = (1, 3),
    param_ratio: int = 1,
) -> dict[str, Tensor]:
    """Replace the ``weight`` of the layers FDConv makes dynamic by its ``dft_weight``.

    Args:
        state_dict: a plain ResNet's (torchvision or mmsegmentation names) or ViT's tensors,
            with or without a ``backbone.`` prefix. Left as it is.
        use_fdconv_if_c_gt: layers with more input and output channels than this are dynamic.
        use_fdconv_if_k_in: kernel sizes that are.
        param_ratio: how many copies of the spectrum a layer has.

    Returns:
        All tensors; for a converted layer ``dft_weight``, ``(P, O·k, I·k/2 + 1, 2)`` float32,
        in place of ``weight``. The attentions are not in it: they start as a new network's.

    Raises:
        CheckpointError: the weights already are of an FDConv network.
    """
    dynamic = next((key for key in state_dict if key.endswith(".dft_weight")), None)
    if dynamic is not None:
        raise CheckpointError(
            f"These weights are of an FDConv network already ({dynamic}). Expected plain ones."
        )
    result: dict[str, Tensor] = {}
    for key, weight in state_dict.items():
        conv = weight.ndim == 4 and _CONV.search(key) and weight.shape[2] in use_fdconv_if_k_in
        linear = weight.ndim == 2 and _LINEAR.search(key)
        if (conv or linear) and min(weight.shape[:2]) > use_fdconv_if_c_gt:
            name = key.removesuffix("weight") + "dft_weight"
            result[name] = spectrum_of(weight).repeat(param_ratio, 1, 1, 1)
        else:
            result[key] = weight
    return result


def spectrum_of(weight: Tensor) -> Tensor:
    """The half spectrum a layer stores for a kernel.

    Args:
        weight: ``(O, I, kh, kw)`` or ``(O, I)``, any float.

    Returns:
        ``(1, O·kh, I·kw/2 + 1, 2)`` float32, real and imaginary: ``rfft2`` of the matrix
        ``M[o·kh + u, i·kw + v]``, divided by ``min(I, O) // 2``.
    """
    out, into = weight.shape[:2]
    if weight.ndim == 4:
        weight = weight.transpose(1, 2).reshape(out * weight.shape[2], -1)
    spectrum = torch.fft.rfft2(weight.detach().float()) / (min(out, into) // 2)
    return torch.view_as_real(spectrum)[None].contiguous()
