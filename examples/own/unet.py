"""A small UNet whose double convolutions are FDConv layers, written with `FDConv2d`.

    python examples/own/unet.py -o unet-bundle

Nothing in the network knows of export: `FDConv2d` takes the place of `nn.Conv2d`.
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


def double(into: int, out: int) -> nn.Sequential:
    """Two 3×3 FDConv layers. The first one of an image's three channels stays plain by itself:
    FDConv is for more than 16 channels.
    """
    layers: list[nn.Module] = []
    for channels in (into, out):
        layers += [
            FDConv2d(channels, out, 3, padding=1, bias=False, kernel_num=16),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """``(B, 3, H, W)`` -> ``(B, classes, H, W)`` logits; H and W are multiples of 4."""

    def __init__(self, classes: int = 5, width: int = 32) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [double(3, width), double(width, 2 * width), double(2 * width, 2 * width)]
        )
        self.up = nn.ModuleList([double(4 * width, width), double(2 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Down, and up again past what was seen on the way."""
        seen = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            seen.append(x)
        for block, skip in zip(self.up, reversed(seen[:-1]), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return self.head(x)


def main(arguments: list[str] | None = None) -> None:
    """Export a network of random weights and answer from the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("unet-bundle"))
    output = parser.parse_args(arguments).output
    torch.manual_seed(0)
    network = UNet().eval()  # in practice: network.load_state_dict(your weights)
    example = torch.rand(1, 3, 64, 96)
    bundle = export_module(
        network, example, output, batches=(1, 4), input_name="image", output_names=["logits"]
    )
    layers = bundle.manifest.graph["fdconv_layers"]
    with open_session(output) as session:  # needs no torch
        answer = session.run_raw({"image": example.numpy()})["logits"]
    with torch.no_grad():
        expected = network(example).numpy()
    error = np.abs(answer - expected).max() / np.abs(expected).max()
    print(f"{output}: {layers} FDConv layers, {answer.shape}, {error:.1e} from PyTorch")


if __name__ == "__main__":
    main()
