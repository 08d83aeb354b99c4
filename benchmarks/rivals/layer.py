"""What the rivals have in common: a convolution whose kernels are made anew for each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class RivalConv2d(nn.Module):
    """A bias-free 2-d convolution to take the place of a plain one.

    Every image of a batch is convolved with kernels of its own, which is one convolution
    with as many groups as images; no image's answer depends on another's.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k, of a square kernel.
        stride: of both axes.
        padding: of both axes, in pixels.
        dilation: of both axes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = kernel_size, stride
        self.padding, self.dilation = padding, dilation

    @classmethod
    def like(cls, conv: nn.Conv2d, **settings: Any) -> Self:
        """A fresh one of a plain convolution's shape.

        Raises:
            ValueError: ``conv`` has groups, a bias or a kernel, stride, padding or dilation
                that differs between the axes, which none of these methods' networks has.
        """
        pairs = [conv.kernel_size, conv.stride, conv.padding, conv.dilation]
        if conv.groups != 1 or conv.bias is not None or any(p[0] != p[1] for p in pairs):
            raise ValueError(f"expected a square convolution without groups and bias, got {conv}")
        sizes = [cast("int", pair[0]) for pair in pairs]
        return cls(conv.in_channels, conv.out_channels, *sizes, **settings)

    def extra_repr(self) -> str:
        """As a plain convolution says it."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """``x`` (B, I, H, W) with B kernels (O, I, k, k), image by image: (B, O, h, w).

        ``kernels`` is of any shape that holds them in this order.
        """
        batch, _, height, width = x.shape
        y = F.conv2d(
            x.reshape(1, batch * self.in_channels, height, width),
            kernels.reshape(-1, self.in_channels, self.kernel_size, self.kernel_size),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=batch,
        )
        return y.reshape(batch, self.out_channels, y.shape[-2], y.shape[-1])

    def shared_convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """``x`` (B, I, H, W) with one ``kernel`` (O, I, k, k) for all images."""
        return F.conv2d(x, kernel, None, self.stride, self.padding, self.dilation)


class KernelMixture(RivalConv2d):
    """Kernels that are a weighted sum of ``kernels`` learned ones.

    Subclasses say how `weights` come from the image.
    """

    def __init__(self, *geometry: int, kernels: int) -> None:
        super().__init__(*geometry)
        size = self.kernel_size
        self.weight = nn.Parameter(
            torch.empty(kernels, self.out_channels, self.in_channels, size, size)
        )
        initialise(self.weight)

    def weights(self, pooled: Tensor) -> Tensor:
        """(B, I) average of the image -> (B, kernels) float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``(B, I, H, W)`` float32 -> ``(B, O, h, w)``."""
        return self.convolve(x, torch.mm(self.weights(pool(x)), self.weight.flatten(1)))


def pool(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C), the average over the image."""
    return x.mean((2, 3))


@torch.no_grad()
def initialise(kernels: Tensor) -> None:
    """He's normal initialisation of each of several kernels (n, O, I, k, k), in place."""
    for kernel in kernels:
        nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
