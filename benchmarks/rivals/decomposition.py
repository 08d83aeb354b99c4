"""DCD (Li et al., ICLR 2021, arXiv 2103.08756): dynamic convolution decomposition.

Kernel = Λ(x) W₀ + P Φ(x) Qᵀ. As published, the sum is applied to features instead of being
formed: a static convolution whose outputs are scaled, beside a narrow branch Q, Φ, P.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.layer import RivalConv2d, pool


class DecomposedConv2d(RivalConv2d):
    """``y = Λ(x) ⊙ (W₀ * x) + P z + P norm(Φ(x) z)`` with ``z = norm(Q x)``, strided as W₀.

    Φ is (L, L) with L = ⌊√I⌋, of rank and place as published; a 3×3 layer's dynamic part is
    1×1. The branch that makes Λ and Φ squeezes I channels to max(I, L²) / 16.

    Args:
        geometry: as of `RivalConv2d`.
    """

    def __init__(self, *geometry: int) -> None:
        super().__init__(*geometry)
        narrow = math.isqrt(self.in_channels)
        hidden = max(self.in_channels, narrow**2) // 16
        size = self.kernel_size
        self.narrow = narrow
        self.weight = nn.Parameter(torch.empty(self.out_channels, self.in_channels, size, size))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.q = nn.Conv2d(self.in_channels, narrow, 1, self.stride, bias=False)
        self.p = nn.Conv2d(narrow, self.out_channels, 1, bias=False)
        self.q_norm = nn.BatchNorm2d(narrow)
        self.phi_norm = nn.BatchNorm1d(narrow)
        self.squeeze = nn.Linear(self.in_channels, hidden, bias=False)
        self.gate = nn.Linear(hidden, hidden, bias=False)
        self.phi = nn.Linear(hidden, narrow**2, bias=False)
        self.scale = nn.Linear(hidden, self.out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` float32 -> ``(B, O, h, w)``."""
        batch = x.shape[0]
        hidden = self.squeeze(pool(x))
        hidden = hidden * hard_sigmoid(self.gate(hidden))
        phi = self.phi(hidden).reshape(batch, self.narrow, self.narrow)
        scale = hard_sigmoid(self.scale(hidden)).reshape(batch, self.out_channels, 1, 1)
        static = self.shared_convolve(x, self.weight) * scale

        z = self.q_norm(self.q(x))
        flat = z.flatten(2)
        flat = self.phi_norm(torch.bmm(phi, flat)) + flat
        return static + self.p(flat.reshape(z.shape))


def hard_sigmoid(x: Tensor) -> Tensor:
    """From 0 to 1 along a straight line between -3 and 3."""
    return F.relu6(x + 3.0) / 3.0
