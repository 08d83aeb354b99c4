"""Every decode head of mmsegmentation: known by its names, or refused by its own name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdconv_deploy.checkpoints import infer_segmentor_config, inspect_checkpoint, parse_config
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import dynamic_state, infer, saved, shapes_of

REAL = Path(__file__).parents[1] / "real_packages" / "mmsegmentation"
HEADS: dict[str, list[str]] = json.loads((REAL / "heads.json").read_text())["heads"]
CASCADES = json.loads((REAL / "heads.json").read_text())["cascades"]
STOCK = json.loads((REAL / "stock.json").read_text())
SUPPORTED = ("UPerHead", "FCNHead", "PSPHead", "ASPPHead", "DepthwiseSeparableASPPHead")
LIST = f"Supported decode heads: {', '.join(SUPPORTED)}."


@cache
def backbone() -> dict[str, Tensor]:
    return {k: v for k, v in dynamic_state().items() if k.startswith("backbone.")}


def with_head(kind: str, prefix: str = "decode_head.") -> dict[str, Tensor]:
    return {prefix + name: torch.empty(1, 1, 1, 1, device="meta") for name in HEADS[kind]}


@pytest.mark.parametrize("kind", sorted(set(HEADS) - set(SUPPORTED)))
@pytest.mark.parametrize("config", [False, True], ids=["names", "config"])
def test_other_heads_are_refused_by_name(kind: str, config: bool) -> None:
    section = {"decode_head": {"type": kind}} if config else None
    with pytest.raises(CheckpointError) as refused:
        infer(backbone() | with_head(kind), section)
    assert f"decode_head is a {kind}" in str(refused.value)
    assert LIST in str(refused.value)


@pytest.mark.parametrize("kind", ["fdconv_kn64", "plain"])
def test_mask2former_is_refused_by_name(oracle: Path, kind: str) -> None:
    path = oracle / f"families/keys/mask2former_r50_cityscapes_{kind}_keys.json"
    shapes = json.loads(path.read_text())
    with pytest.raises(CheckpointError, match="decode_head is a Mask2FormerHead"):
        infer(
            backbone()
            | {k: torch.empty(1, device="meta") for k in shapes if k.startswith("decode_head.")}
        )


def test_a_subclass_may_be_called_what_it_computes_as() -> None:
    state, section = dynamic_state(), {"decode_head": {"type": "MyUPerHead"}}
    with pytest.raises(CheckpointError, match=r"set decode_head\.type=UPerHead"):
        infer(state, section)
    found = infer(state, section, overrides={"decode_head.type": "UPerHead"})
    assert found.architecture.decode_head.type == "UPerHead"
    with pytest.raises(CheckpointError, match=r"decode_head\.type"):
        infer(state, section, overrides={"decode_head.type": "PSPHead"})


@pytest.mark.parametrize("name", CASCADES)
@pytest.mark.parametrize("config", [False, True], ids=["names", "config"])
def test_cascades_are_refused_by_the_names_of_their_heads(name: str, config: bool) -> None:
    kinds = CASCADES[name]["heads"]
    state = dict(backbone())
    for number, kind in enumerate(kinds):
        state |= with_head(kind, f"decode_head.{number}.")
    model: dict[str, Any] = {"type": CASCADES[name]["type"]}
    model["decode_head"] = [{"type": kind} for kind in kinds]
    with pytest.raises(CheckpointError) as refused:
        infer(state, model if config else None)
    assert "CascadeEncoderDecoder" in str(refused.value)
    assert ", ".join(kinds) in str(refused.value)
    assert LIST in str(refused.value)


def test_inspect_names_an_unsupported_head(tmp_path: Path) -> None:
    state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in backbone().items()}
    state |= {k: torch.zeros(1, 1, 1, 1) for k in with_head("OCRHead")}
    report = inspect_checkpoint(saved(tmp_path / "a.pth", state))
    assert report.problem is not None
    assert "decode_head is a OCRHead" in report.problem
    assert LIST in report.problem


def stock_state(name: str) -> dict[str, Tensor]:
    shapes = STOCK["backbone"] | STOCK["networks"][name]["shapes"]
    return {
        key: torch.empty(
            shape, device="meta", dtype=torch.int64 if key.endswith("tracked") else torch.float32
        )
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("name", STOCK["networks"])
@pytest.mark.parametrize("config", [False, True], ids=["shapes", "config"])
def test_stock_networks_of_full_size_are_told_in_full(name: str, config: bool) -> None:
    """Shapes alone tell the stock network, and rebuild exactly its tensors."""
    state = stock_state(name)
    text = STOCK["networks"][name]["config"]
    found = infer_segmentor_config(state, config=parse_config(text) if config else None)
    backbone, head = found.architecture.backbone, found.architecture.decode_head
    assert (backbone.strides, backbone.dilations) == ((1, 2, 1, 1), (1, 1, 2, 4))
    assert (backbone.deep_stem, backbone.contract_dilation) == (True, True)
    assert (head.in_channels, head.in_index, head.channels) == ((2048,), (3,), 512)
    assert head.num_classes == 19
    if name != "pspnet_r50-d8":
        assert head.dilations == (1, 12, 24, 36)
    if name == "deeplabv3plus_r50-d8":
        assert (head.c1_in_channels, head.c1_channels) == (256, 48)
    rebuilt = {k: v.shape for k, v in shapes_of(found.architecture).items()}
    assert rebuilt == {k: v.shape for k, v in state.items()}
    assumed = {fact.field for fact in found.assumed}
    assert ("backbone.strides" in assumed) is not config
