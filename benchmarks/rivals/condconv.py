"""CondConv (Yang et al., NeurIPS 2019, arXiv 1904.04971): experts routed by a sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.rivals.layer import KernelMixture


class CondConv2d(KernelMixture):
    """Kernel = Σ σ(R · mean(x) + r)_i W_i over ``experts`` kernels (the paper's equation 1 and 2).

    Args:
        geometry: as of `RivalConv2d`.
        experts: how many kernels; 8 in the tables.
    """

    def __init__(self, *geometry: int, experts: int = 8) -> None:
        super().__init__(*geometry, kernels=experts)
        self.routing = nn.Linear(self.in_channels, experts)

    def weights(self, pooled: Tensor) -> Tensor:
        """Each expert's weight lies between 0 and 1, independent of the others'."""
        return torch.sigmoid(self.routing(pooled))
