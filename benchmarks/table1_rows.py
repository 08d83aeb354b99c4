"""Table 1's rows: the networks that are counted and timed, and what the paper says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from benchmarks.cases import LastFeature
from benchmarks.networks import backbone, upernet
from benchmarks.rivals import METHODS, install
from fdconv_deploy.nn import ResNet, Segmentor

PLAIN, FDCONV = "plain", "fdconv"
# The size of the paper's FLOPs column: mmdetection's usual 1280×800.
COUNTED_AT = (800, 1280)


@dataclass(frozen=True)
class Frame:
    """What the methods are put into.

    ``network``: "backbone" gives its last feature map, "upernet" is a segmentor around it; a
    method changes the backbone alone. ``channels``: the first stage's, 64 as published.
    ``kernel_num``: FDConv's.
    """

    network: str = "backbone"
    channels: int = 64
    kernel_num: int = 64


@dataclass(frozen=True)
class Published:
    """What the paper's Table 1 says a method adds: millions of parameters, billions of FLOPs."""

    title: str
    parameters: float | None
    flops: float | None


def rows(methods: Iterable[str] = METHODS) -> dict[str, Published]:
    """The table's rows, in its order: plain, the rivals asked for, FDConv."""
    rivals = {key: METHODS[key] for key in METHODS if key in set(methods)}
    return {
        PLAIN: Published("ResNet-50, plain", None, None),
        **{key: Published(m.title, m.parameters, m.flops) for key, m in rivals.items()},
        FDCONV: Published("FDConv", 3.6, 1.8),
    }


def make(row: str, frame: Frame) -> nn.Module:
    """A row's network with fresh weights, in eval mode."""
    kernels = frame.kernel_num if row == FDCONV else None
    if frame.network == "upernet":
        segmentor = Segmentor(upernet(50, kernels, width=frame.channels))
        made, changed = segmentor, segmentor.backbone
    else:
        changed = ResNet(backbone(50, kernels, frame.channels))
        made = LastFeature(changed)
    if row in METHODS:
        install(changed, row)
    return made.eval()
