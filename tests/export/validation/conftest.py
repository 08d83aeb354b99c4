"""A stable network and one that amplifies rounding, exported, for graphs to be damaged."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fdconv_deploy.export.api import export_module
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.runtime.bundle import Bundle
from tests.reference.lively import lively_input
from tests.reference.networks import batch_norm, dynamic


@dataclass(frozen=True)
class Exported:
    network: nn.Module
    example: Tensor
    bundle: Bundle


@torch.no_grad()
def chain(depth: int, variance: float) -> nn.Module:
    """Layers one after the other, normalised; ``variance``: of the attentions' BatchNorm.

    A small one drives the attentions to their ends, where each amplifies what it is given.
    """
    torch.manual_seed(0)
    blocks = [nn.Sequential(dynamic(i), batch_norm(18, seed=i), nn.ReLU()) for i in range(depth)]
    network = nn.Sequential(*blocks).eval()
    for layer in dynamic_layers(network).values():
        layer.KSM_Global.bn.running_var.mul_(variance)
    x = lively_input((2, 18, 17, 20))
    for block in blocks:
        y = block[0](x)
        block[1].running_mean.copy_(y.mean((0, 2, 3)))
        block[1].running_var.copy_(y.var((0, 2, 3)) + 1e-3 * y.var())
        x = block(x)
    return network


def exported(depth: int, variance: float, path) -> Exported:
    network, example = chain(depth, variance), lively_input((1, 18, 17, 20), seed=5)
    return Exported(network, example, export_module(network, example, path, batches=(1, 2)))


@pytest.fixture(scope="session")
def stable(tmp_path_factory) -> Exported:
    return exported(3, 1.0, tmp_path_factory.mktemp("stable") / "bundle")


@pytest.fixture(scope="session")
def unstable(tmp_path_factory) -> Exported:
    return exported(12, 0.01, tmp_path_factory.mktemp("unstable") / "bundle")
