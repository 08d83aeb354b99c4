"""Decode heads: their types, settings and outputs, and which are refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fdconv_deploy.checkpoints import inspect_checkpoint, load_checkpoint, read_checkpoint
from fdconv_deploy.checkpoints.config_parser import parse_config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.settings import Inference, Setting
from fdconv_deploy.config import DecodeHeadConfig, HeadType, UPerHeadConfig
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.runtime.segmentation import classes_of
from tests.checkpoints.small import (
    dynamic_state,
    head_config,
    infer,
    saved,
    shapes_of,
    small_architecture,
    weights_of,
)


def test_head_not_known_here_is_refused() -> None:
    state = dynamic_state()
    with pytest.raises(CheckpointError, match="decode_head is a GCHead: it has gc_block"):
        infer(
            {k: v for k, v in state.items() if k.startswith("backbone.")}
            | {"decode_head.gc_block.conv_mask.weight": torch.empty(1, 1, 1, 1)},
            {"decode_head": {"type": "GCHead"}},
        )
    moved = {k.replace("backbone.layer4.1.conv2", "decode_head.x"): v for k, v in state.items()}
    with pytest.raises(CheckpointError, match=r"decode_head\.x is an FDConv layer"):
        infer(moved)
    with pytest.raises(CheckpointError, match="has a neck"):
        infer(state | {"neck.lateral.weight": torch.empty(1)})
    wide = state | {"decode_head.lateral_convs.0.conv.weight": torch.empty(8, 99, 1, 1)}
    with pytest.raises(CheckpointError, match="takes feature maps of 99 channels"):
        infer(wide)


def state_with(**head: Any) -> dict[str, torch.Tensor]:
    """Shapes of a small network, outputs of 8, 16, 32 and 64 channels, with another head."""
    common = {"in_channels": (64,), "in_index": (3,), "channels": 8, "num_classes": 3}
    config = head_config(**(common | head))
    return shapes_of(small_architecture().model_copy(update={"decode_head": config}))


def setting_of(found: Inference, field: str) -> Setting:
    return next(fact for fact in (*found.found, *found.assumed) if fact.field == field)


def test_head_dilations_are_noted_and_must_fit_the_kernels() -> None:
    state = state_with(type="ASPPHead", dilations=(1, 12, 24, 36))
    found = infer(state)
    assert found.architecture.decode_head.dilations == (1, 12, 24, 36)
    fact = setting_of(found, "decode_head.dilations")
    assert (fact.source, "stock d8" in fact.note) == ("published default", True)
    # A config that is silent means the class's own default, not a stock config's.
    silent = infer(state, {"decode_head": {"type": "ASPPHead"}, "backbone": {"type": "ResNet"}})
    assert silent.architecture.decode_head.dilations == (1, 6, 12, 18)
    assert silent.architecture.backbone.strides == (1, 2, 2, 2)
    given = infer(state, {"decode_head": {"dilations": [1, 2, 3, 4]}})
    assert setting_of(given, "decode_head.dilations").source == "config"
    with pytest.raises(CheckpointError, match=r"dilations: .* greater than or equal to 1"):
        infer(state, {"decode_head": {"dilations": [1, 0, 3, 4]}})
    for wrong in ([2, 1, 3, 4], [1, 2, 3]):
        with pytest.raises(CheckpointError, match=r"1×1, 3×3, 3×3, 3×3 kernels"):
            infer(state, {"decode_head": {"dilations": wrong}})
    with pytest.raises(CheckpointError, match=r"decode_head\.dilations is not known"):
        infer(state_with(type="DepthwiseSeparableASPPHead", dilations=(2, 4)))


def test_head_finer_map_is_the_first_output() -> None:
    head = {"type": "DepthwiseSeparableASPPHead", "c1_in_channels": 8, "c1_channels": 5}
    found = infer(state_with(**head))
    head_found = found.architecture.decode_head
    assert (head_found.c1_in_channels, head_found.c1_channels) == (8, 5)
    assert setting_of(found, "decode_head.c1_channels").source == "shapes"
    with pytest.raises(CheckpointError, match=r"decode_head\.c1_channels"):
        infer(state_with(**head), {"decode_head": {"c1_channels": 48}})
    other = state_with(**(head | {"c1_in_channels": 16}))
    with pytest.raises(CheckpointError, match=r"c1_bottleneck takes 16 channels, and .* has 8"):
        infer(other)


@pytest.mark.parametrize("kind", ["PSPHead", "ASPPHead", "FCNHead", "DepthwiseSeparableASPPHead"])
def test_head_joined_maps_are_inferred_from_their_channels(kind: str) -> None:
    joined = {"in_channels": (64, 8, 32), "in_index": (3, 0, 2), "input_transform": "resize_concat"}
    state = state_with(type=kind, **joined)
    found = infer(state).architecture.decode_head
    assert (found.input_transform, found.in_index) == ("resize_concat", (0, 2, 3))
    assert setting_of(infer(state), "decode_head.in_index").source == "published default"
    section = {
        "input_transform": "resize_concat",
        "in_index": [-1, 0, 2],
        "in_channels": [64, 8, 32],
    }
    if "ASPP" in kind:
        section["dilations"] = (1, 6, 12, 18)
    written = infer(state, {"decode_head": section}).architecture.decode_head
    assert (written.in_index, written.in_channels) == ((3, 0, 2), (64, 8, 32))
    with pytest.raises(CheckpointError, match=r"decode_head\.in_index"):
        infer(state, {"decode_head": section | {"in_index": [1, 0, 2]}})
    with pytest.raises(CheckpointError, match=r"decode_head\.input_transform"):
        infer(state, {"decode_head": {"input_transform": "multiple_select"}})


def test_head_of_one_joined_map_takes_that_map() -> None:
    state = state_with(type="PSPHead")
    section = {"input_transform": "resize_concat", "in_index": [3], "in_channels": [64]}
    assert infer(state, {"decode_head": section}).architecture.decode_head.in_index == (3,)


def test_head_without_normalisation() -> None:
    state = state_with(type="PSPHead", norm=False)
    found = infer(state)
    assert found.architecture.decode_head.norm is False
    assert setting_of(found, "decode_head.norm").source == "names"
    with pytest.raises(CheckpointError, match=r"decode_head\.norm: .* biases and no normalisation"):
        infer(state, {"decode_head": {"norm_cfg": {"type": "BN"}}})


def test_head_of_another_normalisation_is_refused_by_name() -> None:
    state = state_with(type="ASPPHead")
    grouped = {
        key.replace(".bn.", ".gn."): value
        for key, value in state.items()
        if not (key.startswith("decode_head.") and ".running_" in key)
    }
    with pytest.raises(CheckpointError, match=r"decode_head\.image_pool\.1 .* normalised by gn"):
        infer(grouped)
    cut = dict(state)
    del cut["decode_head.bottleneck.bn.running_var"]
    with pytest.raises(CheckpointError, match=r"bottleneck is a convolution without bn\.running"):
        infer(cut)


@pytest.mark.parametrize("kind", ["PSPHead", "ASPPHead", "DepthwiseSeparableASPPHead"])
@pytest.mark.parametrize("lost", ["conv_seg", "bottleneck", "psp_modules", "image_pool"])
def test_head_with_tensors_missing_is_refused(kind: str, lost: str) -> None:
    state = state_with(type=kind)
    cut = {k: v for k, v in state.items() if not k.startswith(f"decode_head.{lost}.")}
    if len(cut) < len(state):
        with pytest.raises(CheckpointError, match="decode_head is of an unknown type"):
            infer(cut)
    flat = {k: v.flatten() if f"head.{lost}." in k else v for k, v in state.items()}
    if lost != "bottleneck" and len(cut) < len(state):
        with pytest.raises(CheckpointError, match=r"has shape \(\d+,\). Expected a tensor of"):
            infer(flat)


REAL = Path(__file__).parents[1] / "real_packages" / "mmsegmentation"

HEADS: dict[str, list[str]] = json.loads((REAL / "heads.json").read_text())["heads"]

CASCADES = json.loads((REAL / "heads.json").read_text())["cascades"]

STOCK = json.loads((REAL / "stock.json").read_text())

SUPPORTED = get_args(HeadType)

LIST = f"Supported decode heads: {', '.join(SUPPORTED)}."


@cache
def backbone() -> dict[str, Tensor]:
    return {k: v for k, v in dynamic_state().items() if k.startswith("backbone.")}


def with_head(kind: str, prefix: str = "decode_head.") -> dict[str, Tensor]:
    return {prefix + name: torch.empty(1, 1, 1, 1, device="meta") for name in HEADS[kind]}


@pytest.mark.parametrize("kind", sorted(set(HEADS) - set(SUPPORTED)))
@pytest.mark.parametrize("config", [False, True], ids=["names", "config"])
def test_head_of_another_type_is_refused_by_name(kind: str, config: bool) -> None:
    section = {"decode_head": {"type": kind}} if config else None
    with pytest.raises(CheckpointError) as refused:
        infer(backbone() | with_head(kind), section)
    assert f"decode_head is a {kind}" in str(refused.value)
    assert LIST in str(refused.value)


def test_head_type_of_a_subclass_may_be_given() -> None:
    state, section = dynamic_state(), {"decode_head": {"type": "MyUPerHead"}}
    with pytest.raises(CheckpointError, match=r"set decode_head\.type=UPerHead"):
        infer(state, section)
    found = infer(state, section, overrides={"decode_head.type": "UPerHead"})
    assert found.architecture.decode_head.type == "UPerHead"
    with pytest.raises(CheckpointError, match=r"decode_head\.type"):
        infer(state, section, overrides={"decode_head.type": "PSPHead"})


@pytest.mark.parametrize("name", CASCADES)
@pytest.mark.parametrize("config", [False, True], ids=["names", "config"])
def test_head_cascade_is_refused_by_the_names_of_its_heads(name: str, config: bool) -> None:
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


def test_head_that_is_unsupported_is_named_by_inspect(tmp_path: Path) -> None:
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
def test_head_of_a_stock_network_is_inferred_in_full(name: str, config: bool) -> None:
    """Shapes alone tell the stock network, and rebuild exactly its tensors."""
    state = stock_state(name)
    text = STOCK["networks"][name]["config"]
    found = infer_config(state, config=parse_config(text) if config else None)
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


TWO = {"num_classes": 2, "out_channels": 1}


def shapes(**head: Any) -> dict[str, torch.Tensor]:
    return shapes_of(small_architecture(head=head))


def told(head: dict[str, Any] | None, **more: Any) -> DecodeHeadConfig:
    model = None if head is None else {"decode_head": head}
    return infer(shapes(**TWO), model, **more).architecture.decode_head


@pytest.mark.parametrize(
    ("fields", "classes", "expected"),
    [
        ("num_classes=2, out_channels=1, threshold=0.3", ("background", "road"), (2, 0.3)),
        ("num_classes=1", ("road",), (1, 0.3)),
        ("num_classes=1, threshold=0.5", ("background", "road"), (1, 0.5)),
    ],
)
def test_head_with_one_output_is_understood(
    fields: str, classes: tuple[str, ...], expected: tuple[int, float], tmp_path: Path
) -> None:
    packaged = read_checkpoint(packaged_checkpoint())
    content = {"meta": dict(packaged.meta), "state_dict": dict(packaged.state_dict)}
    for head in ("decode_head", "auxiliary_head"):
        for part in ("weight", "bias"):
            key = f"{head}.conv_seg.{part}"
            content["state_dict"][key] = content["state_dict"][key][:1].clone()
    content["meta"]["cfg"] = content["meta"]["cfg"].replace("num_classes=11", fields)
    palette = [[7, 8, 9]] * len(classes)
    content["meta"]["dataset_meta"] = {"classes": classes, "palette": palette}
    path = tmp_path / "binary.pth"
    torch.save(content, path)
    report = inspect_checkpoint(path)
    assert report.problem is None
    assert report.refusal is None
    assert any("has one output: a pixel is 'road' (label 1)" in note for note in report.notes)
    architecture = load_checkpoint(path, auxiliary=True).architecture
    head = architecture.decode_head
    assert (head.num_classes, head.label_threshold) == expected
    assert (head.outputs, head.labels) == (1, 2)
    names, colours = classes_of(architecture)
    assert names == ("background", "road")
    assert colours[1] == (7, 8, 9)


def test_head_threshold_is_mmsegmentations_by_default() -> None:
    for head in (TWO, {**TWO, "threshold": None}, {"num_classes": 1}, None):
        found = told(head)
        assert found.label_threshold == 0.3
        assert found.outputs == 1
    assumed = infer(shapes(**TWO), {"decode_head": TWO}).assumed
    assert ("decode_head.threshold", 0.3) in {(fact.field, fact.value) for fact in assumed}


def test_head_threshold_may_be_given() -> None:
    assert told({**TWO, "threshold": 0.5}).label_threshold == 0.5
    given = told({**TWO, "threshold": 0.5}, overrides={"decode_head.threshold": 0.9})
    assert given.label_threshold == 0.9


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "half"])
def test_head_threshold_that_is_no_probability_is_refused(threshold: object) -> None:
    with pytest.raises(CheckpointError, match=r"decode_head\.threshold: the config says"):
        told({**TWO, "threshold": threshold})


def test_head_with_one_output_has_one_or_two_classes() -> None:
    assert told(None).num_classes == 2
    assert told(None, meta={"dataset_meta": {"classes": ["road"]}}).num_classes == 1
    assert told({}, meta={"dataset_meta": {"classes": ["rest", "road"]}}).num_classes == 2
    with pytest.raises(CheckpointError, match="has one output, which distinguishes two classes"):
        told({"num_classes": 5, "out_channels": 1})
    with pytest.raises(CheckpointError, match="makes 1 or 2 classes"):
        told(None, meta={"dataset_meta": {"classes": ["a", "b", "c"]}})


def test_head_is_not_changed_by_its_loss() -> None:
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": True}
    head = {"num_classes": 3, "loss_decode": loss, "threshold": 0.5}
    found = infer(shapes(), {"decode_head": head}).architecture.decode_head
    assert (found.outputs, found.labels, found.label_threshold) == (3, 3, None)
    with pytest.raises(CheckpointError, match="3 outputs, of which the highest wins"):
        infer(shapes(), overrides={"decode_head.threshold": 0.5})


@pytest.mark.parametrize("head", [{**TWO, "threshold": 0.7}, {"num_classes": 1, "threshold": 0.3}])
def test_head_with_one_output_is_read_back(head: dict[str, Any]) -> None:
    architecture = small_architecture(head=head)
    text = format_config(architecture)
    found = infer_config(
        weights_of(architecture), config=parse_config(text), meta={"CLASSES": architecture.classes}
    ).architecture
    assert found.decode_head == architecture.decode_head


def test_head_is_read_back_and_from_bundles_without_a_threshold() -> None:
    plain = small_architecture().decode_head
    older = {n: v for n, v in plain.model_dump().items() if n not in ("out_channels", "threshold")}
    assert UPerHeadConfig.model_validate(older) == plain
    binary = small_architecture(head={**TWO, "threshold": 0.3}).decode_head
    assert UPerHeadConfig.model_validate(binary.model_dump()) == binary
