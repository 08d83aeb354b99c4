"""ODConv (Li et al., ICLR 2022, arXiv 2209.07947): attention along all dimensions of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.rivals.layer import RivalConv2d, initialise, pool


class OmniDimensionalConv2d(RivalConv2d):
    """Kernel = Σ_i α_w,i α_f α_c α_s W_i: per kernel, output channel, input channel and tap.

    As published the channel and output attentions scale the features instead of the kernels,
    which is the same; 1×1 kernels have no attention per tap. The published code scales each
    of the n kernels before it sums them; here they are mixed by one matrix product, which is
    the same, too, and several times as fast.

    Args:
        geometry: as of `RivalConv2d`.
        kernels: n, how many kernels; 4 in the tables.
        reduction: hidden channels of the attention, as a share of the input's; at least 16.
    """

    def __init__(self, *geometry: int, kernels: int = 4, reduction: float = 1 / 16) -> None:
        super().__init__(*geometry)
        size = self.kernel_size
        hidden = max(int(self.in_channels * reduction), 16)
        self.weight = nn.Parameter(
            torch.empty(kernels, self.out_channels, self.in_channels, size, size)
        )
        initialise(self.weight)
        self.squeeze = nn.Conv2d(self.in_channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.channel = nn.Linear(hidden, self.in_channels)
        self.filter = nn.Linear(hidden, self.out_channels)
        self.tap = nn.Linear(hidden, size * size) if size > 1 else None
        self.kernel = nn.Linear(hidden, kernels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` float32 -> ``(B, O, h, w)``."""
        batch, size = x.shape[0], self.kernel_size
        pooled = pool(x).reshape(batch, self.in_channels, 1, 1)
        hidden = torch.relu(self.norm(self.squeeze(pooled))).flatten(1)
        x = x * torch.sigmoid(self.channel(hidden)).reshape(batch, self.in_channels, 1, 1)
        weights = torch.softmax(self.kernel(hidden), dim=1)
        kernels = torch.mm(weights, self.weight.flatten(1))
        if self.tap is not None:
            # The same for all kernels, so that it may follow their sum.
            taps = torch.sigmoid(self.tap(hidden)).reshape(batch, 1, size * size)
            kernels = kernels.reshape(batch, -1, size * size) * taps
        outputs = torch.sigmoid(self.filter(hidden)).reshape(batch, self.out_channels, 1, 1)
        return self.convolve(x, kernels) * outputs
