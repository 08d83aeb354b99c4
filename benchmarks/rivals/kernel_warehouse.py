"""KernelWarehouse (Li and Yao, ICML 2024, arXiv 2406.07879): layers mix cells they share.

The kernels of a stage's layers are cut into cells of one shape; each cell is a mixture, by
the image's attention, of *all* cells of the stage's warehouse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.layer import RivalConv2d, pool


class WarehouseConv2d(RivalConv2d):
    """A convolution whose kernel is (O/o · I/i · k²) mixtures of a warehouse's cells.

    Attention is linear, normalised by its absolute sum with one more, empty cell: negative
    weights are allowed (the paper's equation 4 with the temperature at its final 0).

    Args:
        geometry: as of `RivalConv2d`.
        cells: ``(n, o, i)`` float32, shared with other layers; o divides O and i divides I.
        reduction: hidden channels of the attention, as a share of the input's; at least 16.
    """

    def __init__(self, *geometry: int, cells: nn.Parameter, reduction: float = 1 / 16) -> None:
        super().__init__(*geometry)
        self.cells = cells
        count, rows, columns = cells.shape
        self.grid = self.out_channels // rows, self.in_channels // columns
        self.mixtures = self.grid[0] * self.grid[1] * self.kernel_size**2
        hidden = max(int(self.in_channels * reduction), 16)
        self.squeeze = nn.Linear(self.in_channels, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.attend = nn.Linear(hidden, self.mixtures * (count + 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` float32 -> ``(B, O, h, w)``."""
        count, rows, columns = self.cells.shape
        hidden = F.relu(self.norm(self.squeeze(pool(x))))
        attention = self.attend(hidden).reshape(-1, count + 1)
        attention = attention / (attention.abs().sum(1, keepdim=True) + 1e-3)
        mixed = torch.mm(attention[:, :-1], self.cells.flatten(1))
        taps = self.kernel_size**2
        mixed = mixed.reshape(-1, taps, *self.grid, rows, columns)
        return self.convolve(x, mixed.permute(0, 2, 4, 3, 5, 1))


def stock(convs: Mapping[str, nn.Conv2d], budget: int) -> dict[str, WarehouseConv2d]:
    """Layers in place of ``convs``, all of one warehouse.

    Cells are 1×1, as wide as the layers' channel counts have in common; there are
    ``budget`` times as many as the kernels would be cut into, so that the warehouse holds
    ``budget`` times the plain kernels' numbers.

    Args:
        convs: by name, the plain convolutions whose places the layers take.
        budget: the n× of the tables: 1 or 4.
    """
    rows = math.gcd(*(conv.out_channels for conv in convs.values()))
    columns = math.gcd(*(conv.in_channels for conv in convs.values()))
    numbers = sum(conv.weight.numel() for conv in convs.values())
    cells = nn.Parameter(torch.empty(budget * numbers // (rows * columns), rows, columns))
    # A mixture of many cells with weights of absolute sum 1 is about √cells smaller than they are.
    nn.init.normal_(cells, 0, math.sqrt(2 / columns))
    return {name: WarehouseConv2d.like(conv, cells=cells) for name, conv in convs.items()}
