"""The FDConv layers of a ResNet-50 at 512×512, and what their kernels are specialised to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fdconv_deploy.ops.frequency_assembly.launch import AssemblySizes, tile_columns

KERNEL_NUM = 64


@dataclass(frozen=True)
class LayerShape:
    """One distinct layer; feature: height (and width) of its input; count: how often it is."""

    in_channels: int
    out_channels: int
    kernel: int
    feature: int
    stride: int
    count: int

    def __str__(self) -> str:
        return f"{self.in_channels}→{self.out_channels} {self.kernel}×{self.kernel}" + (
            f"/{self.stride}" if self.stride > 1 else ""
        )

    @property
    def weights(self) -> int:
        """Of one kernel."""
        return self.in_channels * self.out_channels * self.kernel**2


def _resnet50() -> list[LayerShape]:
    """`tests/ops/gpu/test_layout.py` holds this to the network itself."""
    shapes = []
    before, feature = 64, 128
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        stride = 1 if stage == 0 else 2
        after = feature // stride
        shapes += [
            LayerShape(before, width, 1, feature, 1, 1),
            LayerShape(width, width, 3, feature, stride, 1),
            LayerShape(width, 4 * width, 1, after, 1, blocks),
            LayerShape(4 * width, width, 1, after, 1, blocks - 1),
            LayerShape(width, width, 3, after, 1, blocks - 1),
        ]
        before, feature = 4 * width, after
    return shapes


RESNET50 = _resnet50()


def layer_sizes(out_channels: int, in_channels: int, kernel: int) -> AssemblySizes:
    """Of a layer with everything the published one has, all of it on the kernel."""
    rows, columns = out_channels * kernel, in_channels * kernel
    width = tile_columns(rows, columns // 2 + 1)
    spatial = kernel**2 if kernel > 1 else 0
    return AssemblySizes(
        out_channels,
        in_channels,
        kernel,
        kernel,
        heads=KERNEL_NUM + out_channels + spatial + in_channels,
        filter_at=KERNEL_NUM,
        spatial_at=KERNEL_NUM + out_channels if spatial else -1,
        channel_at=KERNEL_NUM + out_channels + spatial,
        taps=local_taps(in_channels),
        scaled=False,
        planes=1,
        tiles=-(-(columns // 2 + 1) // width),
        width=width,
        wide_groups=False,
    )


def local_taps(in_channels: int) -> int:
    """Width of the local attention's convolution, as published."""
    return 2 * (round(math.log2(in_channels) / 2 + 0.5) // 2) + 1
