"""FDConv in Ultralytics' blocks, as public forks write it: C3k2 with FDConv in its bottlenecks."""

from __future__ import annotations

import torch
from torch import nn
from ultralytics.nn.modules.block import Bottleneck, C3k2
from ultralytics.nn.modules.conv import Conv

from fdconv_deploy.nn import FDConv2d


class FDConv(nn.Module):
    """Convolution, normalisation, activation. No `Conv`: Ultralytics would fuse it, and fail."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.conv = FDConv2d(c1, c2, 3, padding=1, bias=False, kernel_num=4)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class ConvOfFDConv(Conv):
    """As other forks have it: `Conv` with another convolution, on which ``fuse()`` fails."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__(c1, c2, 3)
        self.conv = FDConv2d(c1, c2, 3, padding=1, bias=False, kernel_num=4)


class Bottleneck_FDConv(Bottleneck):
    second: type[nn.Module] = FDConv

    def __init__(self, c1, c2, shortcut=True, g=1, k=(3, 3), e=0.5):
        super().__init__(c1, c2, shortcut, g, k, e)
        self.cv2 = self.second(self.cv2.conv.in_channels, c2)


class C3k2_FDConv(C3k2):
    def __init__(self, c1, c2, n=1, c3k=False, e=0.5, attn=False, g=1, shortcut=True):
        super().__init__(c1, c2, n, c3k, e, attn, g, shortcut)
        self.m = nn.ModuleList(
            Bottleneck_FDConv(self.c, self.c, shortcut, g, e=1.0) for _ in range(n)
        )
