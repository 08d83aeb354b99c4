"""A ConvNet as timm has them, turned into an FDConv network by `replace_convolutions`.

    python examples/own/convnet.py -o convnet-bundle

The network's own code stays as it is, and so do its answers: the layers start as the
convolutions they replace. Training goes on from there; then comes export.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from fdconv_deploy.export import export_module
from fdconv_deploy.nn import replace_convolutions
from fdconv_deploy.runtime import open_session


class Block(nn.Module):
    """ConvNeXt's block with BatchNorm: 7×7 depthwise, then a 1×1 bottleneck turned inside out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.fc1, self.fc2 = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width, H, W)``, and the same out."""
        return x + self.fc2(self.act(self.fc1(self.norm(self.conv_dw(x)))))


class ConvNet(nn.Module):
    """``(B, 3, H, W)`` -> ``(B, classes)`` logits."""

    def __init__(self, widths: tuple[int, ...] = (32, 64), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, 4)
        stages: list[nn.Module] = []
        for before, width in zip((widths[0], *widths), widths, strict=False):
            down = nn.Identity() if before == width else nn.Conv2d(before, width, 2, 2)
            stages.append(nn.Sequential(down, Block(width), Block(width)))
        self.stages = nn.Sequential(*stages)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(B, 3, H, W)`` float32."""
        return self.head(self.pool(self.stages(self.stem(x))).flatten(1))


def main(arguments: list[str] | None = None) -> None:
    """Replace, train a little, export, answer from the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("convnet-bundle"))
    output = parser.parse_args(arguments).output
    torch.manual_seed(0)
    network = ConvNet().eval()
    example = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = network(example)
    # The stem and the depthwise convolutions stay: 4×4, and a group per channel.
    names = replace_convolutions(network, where="stages.*", kernel_num=16)
    with torch.no_grad():
        moved = (network(example) - before).abs().max() / before.abs().max()
    print(f"{len(names)} of its convolutions are FDConv layers: {', '.join(names[:3])}…")
    print(f"the answers moved by {moved:.1e} of the largest")

    optimiser = torch.optim.AdamW(network.train().parameters(), 1e-3)
    for step in range(3):  # in practice: your training
        images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(network(images), torch.arange(8)).backward()
        optimiser.step()
        optimiser.zero_grad()
    network.eval()

    export_module(network, example[:1], output, input_name="image", output_names=["logits"])
    with open_session(output) as session:
        answer = session.run_raw({"image": example[:1].numpy()})["logits"]
    with torch.no_grad():
        agrees = answer.argmax(1) == network(example[:1]).argmax(1).numpy()
    print(f"{output}: {answer.shape}, the same class as PyTorch: {bool(agrees.all())}")


if __name__ == "__main__":
    main()
