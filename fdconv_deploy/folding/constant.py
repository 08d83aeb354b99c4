"""A layer whose attention cannot vary is a plain convolution."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray

from fdconv_deploy.folding.modulation import FoldedLocal, FoldedModulation
from fdconv_deploy.nn.fdconv import FDConv2d


def constant_kernel(
    layer: FDConv2d, modulation: FoldedModulation, local: FoldedLocal | None
) -> NDArray[np.float32] | None:
    """The kernel ``(O, I, kh, kw)`` if no image can change it, else None.

    That is so where all heads are zero and so is the local attention's convolution (or its
    normalisation's weight): converted layers that were never trained, and pruned ones.
    """
    if modulation.varies or (local is not None and local.varies):
        return None
    double = copy.deepcopy(layer).double().eval()
    average = torch.zeros(1, layer.in_channels, dtype=torch.float64)
    with torch.no_grad():
        detail = double.KSM_Local(average) if double.KSM_Local is not None else None
        kernel = double.kernels(double.KSM_Global(average), detail, full=True)
    return kernel[0].float().numpy()
