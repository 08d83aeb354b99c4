"""Bundles that several tests look at: torch's exporter takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fdconv_deploy.export.api import export_module, export_network
from fdconv_deploy.nn import FDConv2d, Segmentor
from fdconv_deploy.runtime.bundle import Bundle
from tests.reference.lively import enliven, lively_input
from tests.reference.networks import Wired, batch_norm, dynamic, small_segmentor


@pytest.fixture(scope="session")
def segmentor() -> Segmentor:
    return small_segmentor(18, 18, stages=2, seed=1)


@pytest.fixture(scope="session")
def bundle(segmentor, tmp_path_factory) -> Bundle:
    """The segmentor at an odd size, for batches of 1, 2 and 5."""
    path = tmp_path_factory.mktemp("segmentor") / "bundle"
    return export_network(segmentor, path, size=(65, 97), batches=(5, 1, 2, 2))


@dataclass(frozen=True)
class ExportedModule:
    module: nn.Module
    example: Tensor
    bundle: Bundle


def _wiring(s: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
    a = s.block(torch.relu(s.stem_norm(s.stem(x))))
    b = s.twin(a)  # read twice: its normalisation cannot be folded
    return s.rect(b + s.twin_norm(b)), s.still(a).mean((2, 3))


@pytest.fixture(scope="session")
def module() -> nn.Module:
    """Nested, of two outputs, with weights shared between layers and each kind of BatchNorm."""
    torch.manual_seed(0)
    first, twin = dynamic(0), dynamic(1)
    twin.dft_weight = first.dft_weight
    still = dynamic(2)
    with torch.no_grad():
        still.KSM_Global.relu.scale.zero_()
        still.KSM_Local.conv.weight.zero_()
    return Wired(
        _wiring,
        stem=nn.Conv2d(4, 18, 3, 2, 1),
        stem_norm=batch_norm(18, seed=1),
        block=nn.Sequential(first, batch_norm(18, seed=2), nn.ReLU()),
        twin=twin,
        twin_norm=batch_norm(18, affine=False, seed=3),
        rect=enliven(FDConv2d(18, 20, (1, 3), (2, 1), "valid", 2, kernel_num=5)),
        still=still,
    ).eval()


@pytest.fixture(scope="session")
def exported_module(module, tmp_path_factory) -> ExportedModule:
    example = lively_input((3, 4, 23, 30))
    bundle = export_module(
        module,
        example,
        tmp_path_factory.mktemp("module") / "bundle",
        batches=(1, 5),
        input_name="pixels",
        output_names=["map", "vector"],
    )
    return ExportedModule(module, example, bundle)
