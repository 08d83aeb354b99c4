"""Which convolutions of a ResNet each method of Table 1 replaces, and what the paper says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from benchmarks.rivals.condconv import CondConv2d
from benchmarks.rivals.decomposition import DecomposedConv2d
from benchmarks.rivals.dynamic_convolution import DynamicConv2d
from benchmarks.rivals.kernel_warehouse import stock
from benchmarks.rivals.layer import RivalConv2d
from benchmarks.rivals.omni_dimensional import OmniDimensionalConv2d

Convs = Mapping[str, nn.Conv2d]
_NAME = re.compile(r"layer(?P<stage>\d)\.(?P<block>\d+)\.(?P<place>conv[123]|downsample\.\d)")


@dataclass(frozen=True)
class Method:
    """A row of Table 1.

    Attributes:
        title: the method, with its convolution parameter budget n× as the table has it.
        source: where the settings come from.
        replaces: which convolutions, in words.
        parameters: the table's added parameters, in millions.
        flops: the table's added FLOPs, in billions; None where it has none.
        replacements: plain convolutions of the blocks by name -> layers in their places.
    """

    title: str
    source: str
    replaces: str
    parameters: float
    flops: float | None
    replacements: Callable[[Convs], Mapping[str, RivalConv2d]]


def block_convs(network: nn.Module) -> dict[str, nn.Conv2d]:
    """The plain convolutions of a ResNet's blocks, shortcuts' included, by name and in order."""
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) is nn.Conv2d and _NAME.fullmatch(name)
    }


def install(network: nn.Module, method: str) -> nn.Module:
    """Put a method's layers into a ResNet with plain convolutions, in place.

    Args:
        network: such as ``fdconv_deploy.nn.ResNet`` builds from a config without ``conv``.
        method: a key of `METHODS`.

    Returns:
        The network, with fresh random weights in the new layers.

    Raises:
        ValueError: the network's blocks have no plain convolutions to replace.
    """
    convs = block_convs(network)
    layers = METHODS[method].replacements(convs)
    if not layers:
        raise ValueError(f"expected a ResNet with plain convolutions, got {type(network).__name__}")
    for name, layer in layers.items():
        network.set_submodule(name, layer)
    return network


def _main(convs: Convs) -> dict[str, nn.Conv2d]:
    """Without the shortcuts' convolutions."""
    return {name: conv for name, conv in convs.items() if "downsample" not in name}


def _condconv(convs: Convs) -> dict[str, RivalConv2d]:
    chosen = {name: c for name, c in _main(convs).items() if name.startswith("layer4.")}
    return {name: CondConv2d.like(conv, experts=8) for name, conv in chosen.items()}


def _dynamic(convs: Convs) -> dict[str, RivalConv2d]:
    return {name: DynamicConv2d.like(conv, kernels=4) for name, conv in convs.items()}


def _decomposed(convs: Convs) -> dict[str, RivalConv2d]:
    return {name: DecomposedConv2d.like(conv) for name, conv in _main(convs).items()}


def _omni(convs: Convs) -> dict[str, RivalConv2d]:
    return {name: OmniDimensionalConv2d.like(c, kernels=4) for name, c in _main(convs).items()}


def _warehouse(convs: Convs, budget: int) -> dict[str, RivalConv2d]:
    """A warehouse per stage. What changes a stage's width belongs to the stage before it."""
    stages: dict[int, dict[str, nn.Conv2d]] = {}
    for name, conv in convs.items():
        match = _NAME.fullmatch(name)
        assert match is not None
        stage, first = int(match["stage"]), match["block"] == "0"
        if first and (match["place"] == "conv1" or match["place"].startswith("downsample")):
            stage -= 1
        if stage > 0:  # before the first stage there is none to share with: these stay plain
            stages.setdefault(stage, {})[name] = conv
    layers: dict[str, RivalConv2d] = {}
    for shelf in stages.values():
        layers |= stock(shelf, budget)
    return layers


_KW = "the authors' code and configs, github.com/OSVAI/KernelWarehouse"
_KW_PLACES = "all block convolutions but those at the first stage's entrance"

METHODS: dict[str, Method] = {
    "condconv": Method(
        "CondConv (8×)", "arXiv 1904.04971; places inferred from the table's parameters",
        "the last stage's nine block convolutions", 90.0, 0.01, _condconv,
    ),
    "dyconv": Method(
        "DY-Conv (4×)", "arXiv 1912.03458 and github.com/kaijieshi7/Dynamic-convolution-Pytorch",
        "all convolutions but the first", 75.3, 0.16, _dynamic,
    ),
    "dcd": Method(
        "DCD", "the authors' code, github.com/liyunsheng13/dcd",
        "all block convolutions, shortcuts plain", 4.3, 0.13, _decomposed,
    ),
    "odconv": Method(
        "ODConv (4×)", "the authors' code, github.com/OSVAI/ODConv",
        "all block convolutions, shortcuts plain", 65.1, 0.35, _omni,
    ),
    "kw1": Method("KW (1×)", _KW, _KW_PLACES, 2.5, None, partial(_warehouse, budget=1)),
    "kw4": Method("KW (4×)", _KW, _KW_PLACES, 76.5, None, partial(_warehouse, budget=4)),
}  # fmt: skip
