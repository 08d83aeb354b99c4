"""Heads and whole networks against what real mmsegmentation computed with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.config import ResNetConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn import ResNet, Segmentor
from tests.reference.lively import error
from tests.reference.segmentor import predict

REAL = Path(__file__).parents[1] / "real_packages" / "mmsegmentation"
WITH_AUXILIARY = {"psp": "FCNHead", "aspp": "PSPHead", "sep_aspp": "ASPPHead"}


def loaded(name: str) -> Segmentor:
    network = load_checkpoint(REAL / f"{name}.pth", auxiliary=name in WITH_AUXILIARY)
    assert isinstance(network, Segmentor)
    return network


@pytest.mark.parametrize(
    ("name", "kind", "align"),
    [
        ("psp", "PSPHead", False),
        ("psp_aligned", "PSPHead", True),
        ("aspp", "ASPPHead", True),
        ("sep_aspp", "DepthwiseSeparableASPPHead", False),
        ("sep_aspp_aligned", "DepthwiseSeparableASPPHead", True),
        ("sep_aspp_coarse", "DepthwiseSeparableASPPHead", False),
        ("fcn_joined", "FCNHead", True),
    ],
)
@torch.no_grad()
def test_network_equals_mmsegmentation(name: str, kind: str, align: bool) -> None:
    network, tensors = loaded(name), load_file(REAL / f"{name}.safetensors")
    head = network.architecture.decode_head
    assert (head.type, head.align_corners) == (kind, align)
    assert error(network(tensors["input"]), tensors["head_logits"]) <= 1e-5
    # Resized, or slid and resized, to the size of the input.
    assert error(predict(network, tensors["input"]), tensors["logits"]) <= 1e-5


@pytest.mark.parametrize("name", WITH_AUXILIARY)
@torch.no_grad()
def test_auxiliary_head_equals_mmsegmentation(name: str) -> None:
    network, tensors = loaded(name), load_file(REAL / f"{name}.safetensors")
    auxiliary = network.auxiliary_head
    assert auxiliary is not None
    assert auxiliary.config.type == WITH_AUXILIARY[name]
    assert error(auxiliary(network.backbone(tensors["input"])), tensors["aux_logits"]) <= 1e-5


@pytest.mark.parametrize("name", ["psp", "psp_aligned", "sep_aspp", "sep_aspp_aligned"])
@torch.no_grad()
def test_the_fixtures_tell_align_corners_apart(name: str) -> None:
    """With the other setting, the head alone is a hundred times beyond the tolerance."""
    network, tensors = loaded(name), load_file(REAL / f"{name}.safetensors")
    head = network.decode_head
    head.config = head.config.model_copy(update={"align_corners": not head.config.align_corners})
    for module in head.modules():
        if hasattr(module, "align_corners"):
            module.align_corners = head.config.align_corners  # type: ignore[assignment]
    assert error(network(tensors["input"]), tensors["head_logits"]) > 1e-3


def test_multi_grid_has_a_dilation_for_each_block() -> None:
    stage = ResNet(ResNetConfig(depth=50, base_channels=4, multi_grid=(1, 2, 4))).stages[-1]
    assert [block.conv2.dilation for block in stage] == [(1, 1), (2, 2), (4, 4)]
    with pytest.raises(UnsupportedLayerError, match="one dilation for each of the 3 blocks"):
        ResNet(ResNetConfig(depth=50, base_channels=4, multi_grid=(1, 2)))
