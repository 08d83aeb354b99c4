"""DY-Conv (Chen et al., CVPR 2020, arXiv 1912.03458): attention over parallel kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.layer import KernelMixture


class DynamicConv2d(KernelMixture):
    """Kernel = Σ π_i W_i with π = softmax(A₂ relu(A₁ mean(x)) / temperature).

    The temperature is annealed from 30 to 1 while training, so that it is 1 in a trained
    network. No biases in the attention, as in the PyTorch code that the later papers used.

    Args:
        geometry: as of `RivalConv2d`.
        kernels: K, how many kernels; 4 in the tables.
        reduction: hidden channels of the attention, as a share of the input's.
    """

    def __init__(self, *geometry: int, kernels: int = 4, reduction: float = 1 / 4) -> None:
        super().__init__(*geometry, kernels=kernels)
        hidden = int(self.in_channels * reduction)
        self.squeeze = nn.Linear(self.in_channels, hidden, bias=False)
        self.attend = nn.Linear(hidden, kernels, bias=False)

    def weights(self, pooled: Tensor) -> Tensor:
        """Every image's weights sum to 1."""
        return torch.softmax(self.attend(F.relu(self.squeeze(pooled))), dim=1)
