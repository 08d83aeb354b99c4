"""A detector's neck as YOLO has it, with FDConv layers in its blocks: several outputs.

    python examples/own/neck.py -o neck-bundle

A module of several inputs or outputs is exported inside a wrapper that takes one tensor and
gives a tuple, here the backbone and neck together. Boxes are decoded behind the bundle.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.runtime import open_session

LEVELS = ("p3", "p4", "p5")


def conv(into: int, out: int, kernel: int, stride: int = 1, *, dynamic: bool = True) -> nn.Module:
    """Convolution, BatchNorm, SiLU."""
    padding = kernel // 2
    layer: nn.Module
    if dynamic:
        layer = FDConv2d(into, out, kernel, stride, padding, bias=False, kernel_num=16)
    else:
        layer = nn.Conv2d(into, out, kernel, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out), nn.SiLU())


class Fuse(nn.Module):
    """A cross-stage block: half of the channels go through a bottleneck, half around it."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.enter, self.leave = conv(into, out, 1), conv(out + out // 2, out, 1)
        self.bottleneck = nn.Sequential(conv(out // 2, out // 2, 3), conv(out // 2, out // 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, into, H, W)`` -> ``(B, out, H, W)``."""
        x = self.enter(x)
        half = x[:, x.shape[1] // 2 :]
        return self.leave(torch.cat([x, half + self.bottleneck(half)], 1))


class Neck(nn.Module):
    """Top-down, then bottom-up, over three levels of ``width`` channels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.top_down = nn.ModuleList([Fuse(2 * width, width) for _ in range(2)])
        self.shrink = nn.ModuleList([conv(width, width, 3, 2) for _ in range(2)])
        self.bottom_up = nn.ModuleList([Fuse(2 * width, width) for _ in range(2)])

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same three levels, each aware of the others."""
        p4 = self.top_down[0](torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1))
        p3 = self.top_down[1](torch.cat([F.interpolate(p4, scale_factor=2.0), p3], 1))
        p4 = self.bottom_up[0](torch.cat([self.shrink[0](p3), p4], 1))
        p5 = self.bottom_up[1](torch.cat([self.shrink[1](p4), p5], 1))
        return p3, p4, p5


class Features(nn.Module):
    """A plain backbone and the neck: ``(B, 3, H, W)`` -> maps of H/8, H/16 and H/32."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv(3, width // 2, 3, 2, dynamic=False), conv(width // 2, width, 3, 2, dynamic=False)
        )
        self.stages = nn.ModuleList([conv(width, width, 3, 2, dynamic=False) for _ in LEVELS])
        self.neck = Neck(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x``: ``(B, 3, H, W)``, H and W multiples of 32."""
        x = self.stem(x)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return self.neck(*levels)


def main(arguments: list[str] | None = None) -> None:
    """Export a network of random weights and answer from the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("neck-bundle"))
    output = parser.parse_args(arguments).output
    torch.manual_seed(0)
    network = Features().eval()
    example = torch.rand(1, 3, 128, 160)
    export_module(network, example, output, input_name="image", output_names=LEVELS)
    with open_session(output) as session:
        answers = session.run_raw({"image": example.numpy()})
    with torch.no_grad():
        expected = dict(zip(LEVELS, network(example), strict=True))
    for name in LEVELS:
        theirs = expected[name].numpy()
        error = np.abs(answers[name] - theirs).max() / np.abs(theirs).max()
        print(f"{output}: {name} {answers[name].shape}, {error:.1e} from PyTorch")


if __name__ == "__main__":
    main()
