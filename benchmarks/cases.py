"""What is measured: a network, an input size and a batch size."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import backbone, build, trained_like, upernet
from fdconv_deploy.export.validation.sample_inputs import sample_tensor
from fdconv_deploy.nn import ResNet, Segmentor

NETWORKS = ("backbone", "upernet")
DEPTHS = (18, 50, 101)
SIZES = ((512, 512), (512, 1024))
BATCHES = (1, 4)
# One axis at a time, from the R50 backbone at 512×512, batch 1.
SWEEPS: dict[str, tuple[int, ...]] = {"size": (256, 384, 512, 768, 1024), "kernel_num": (4, 16, 64)}


class LastFeature(nn.Module):
    """A backbone that gives its last feature map alone."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[-1]


@dataclass(frozen=True)
class Case:
    """One network at one input. ``channels`` is the backbone's first stage's, 64 as published."""

    network: str
    depth: int
    height: int
    width: int
    batch: int
    kernel_num: int = 64
    channels: int = 64

    @property
    def key(self) -> str:
        """A name to find it by, such as ``upernet-r50-512x1024-b4-k64``."""
        narrow = "" if self.channels == 64 else f"-c{self.channels}"
        size = f"{self.height}x{self.width}"
        return f"{self.network}-r{self.depth}-{size}-b{self.batch}-k{self.kernel_num}{narrow}"

    @property
    def title(self) -> str:
        """For people."""
        name = "UPerNet-R" if self.network == "upernet" else "R"
        kind = "" if self.network == "upernet" else " backbone"
        return f"{name}{self.depth}{kind}, {self.height}×{self.width}, batch {self.batch}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def images(self) -> Tensor:
        """(batch, 3, height, width) float32: drawn scenes."""
        return sample_tensor(self.batch, (self.height, self.width), seed=1)

    def make(self, *, dynamic: bool = True) -> nn.Module:
        """The network with weights that behave as trained ones, or its baseline."""
        kernel_num = self.kernel_num if dynamic else None
        if self.network == "upernet":
            return build(upernet(self.depth, kernel_num, width=self.channels))
        torch.manual_seed(0)
        return trained_like(LastFeature(ResNet(backbone(self.depth, kernel_num, self.channels))))

    def empty(self, *, dynamic: bool = True) -> nn.Module:
        """The same with fresh weights, to load others into."""
        kernel_num = self.kernel_num if dynamic else None
        if self.network == "upernet":
            return Segmentor(upernet(self.depth, kernel_num, width=self.channels)).eval()
        return LastFeature(ResNet(backbone(self.depth, kernel_num, self.channels))).eval()

    @property
    def memory(self) -> float:
        """Bytes that measuring it takes at most, estimated.

        From UPerNet-R50 at 512×512 (benchmarks.session): a run in ONNX Runtime holds 1.7 kB per
        pixel, and there are two such sessions beside PyTorch's own tensors, of the same order.
        Weights are in memory about sixteen times: up to twelve sides, and checkpoints on their way.
        """
        pixels = self.batch * self.height * self.width
        per_pixel = 5500 if self.network == "upernet" else 2500
        weights = (60e6 if self.network == "backbone" else 180e6) + self.depth * 2.5e6
        return 1e9 + 16 * weights + per_pixel * pixels


def parse_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels, or one number for a square."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise ValueError(f"a size is HEIGHTxWIDTH, such as 512x1024, not {text!r}")
    return int(found[1]), int(found[2] or found[1])


def add_case_arguments(parser: argparse.ArgumentParser, network: str = "backbone") -> None:
    """Options that name one case; see `named_case`."""
    parser.add_argument("--network", choices=NETWORKS, default=network)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    add_size_argument(parser)
    add_width_arguments(parser)


def add_size_argument(parser: argparse.ArgumentParser, size: tuple[int, int] = (512, 512)) -> None:
    """How large the images are."""
    parser.add_argument("--size", type=parse_size, default=size, help="HEIGHTxWIDTH")


def add_width_arguments(parser: argparse.ArgumentParser) -> None:
    """How wide the network is."""
    parser.add_argument("--channels", type=int, default=64, help="the first stage's; narrower")
    parser.add_argument("--kernel-num", type=int, default=64, help="FDConv's")


def named_case(options: argparse.Namespace) -> Case:
    """The case that `add_case_arguments`' options name."""
    return Case(
        options.network, options.depth, *options.size, options.batch, options.kernel_num,
        options.channels,
    )  # fmt: skip


def grid(
    networks: Iterable[str] = NETWORKS,
    depths: Iterable[int] = DEPTHS,
    sizes: Iterable[tuple[int, int]] = SIZES,
    batches: Iterable[int] = BATCHES,
    kernel_num: int = 64,
    channels: int = 64,
) -> list[Case]:
    """Every combination, backbones first, the 50 layers before others: what matters most."""
    cases = [
        Case(network, depth, *size, batch, kernel_num, channels)
        for network in networks
        for depth in depths
        for size in sizes
        for batch in batches
    ]
    return sorted(cases, key=lambda case: (case.network, case.depth != 50, case.depth))


def sweep(name: str, channels: int = 64) -> list[Case]:
    """The cases along one axis."""
    start = dict(network="backbone", depth=50, batch=1, channels=channels)
    if name == "size":
        return [Case(**start, height=side, width=side) for side in SWEEPS["size"]]
    if name == "kernel_num":
        return [Case(**start, height=512, width=512, kernel_num=k) for k in SWEEPS["kernel_num"]]
    raise ValueError(f"there are sweeps over {', '.join(SWEEPS)}, not {name!r}")
