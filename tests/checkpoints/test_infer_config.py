"""Segmentors: what names and shapes say always holds; the rest is found elsewhere or assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fdconv_deploy.checkpoints import read_checkpoint
from fdconv_deploy.checkpoints.config_parser import Config, config_of, parse_config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.infer_backbone import infer_backbone
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.settings import Evidence
from fdconv_deploy.checkpoints.state_dict import backbone_prefix, part
from fdconv_deploy.config import FDConvConfig, ResNetConfig
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import (
    dynamic_state,
    infer,
    key_list,
    shapes_of,
    small_architecture,
)


@pytest.mark.parametrize("name", ["mmcv1", "mmengine_published"])
def test_segmentor_of_a_reference_checkpoint_is_inferred_in_full(oracle: Path, name: str) -> None:
    checkpoint = read_checkpoint(oracle / "segmentor" / f"B_r18b14_{name}.pth")
    index = json.loads((oracle / "segmentor" / "index.json").read_text())
    model = index["models"]["B"]["model"]
    found = infer_config(
        checkpoint.state_dict, config=config_of(checkpoint.meta), meta=checkpoint.meta
    )
    backbone = found.architecture.backbone
    for field in ("depth", "base_channels", "num_stages", "deep_stem", "style"):
        assert getattr(backbone, field) == model["backbone"][field]
    assert backbone.conv is not None
    for field, value in model["backbone"]["conv_cfg"].items():
        if field in FDConvConfig.model_fields and field != "fbm_cfg":
            told = getattr(backbone.conv, field)
            assert (list(told) if isinstance(told, tuple) else told) == value
    head = found.architecture.decode_head
    assert list(head.in_channels) == model["decode_head"]["in_channels"]
    assert (head.type, head.channels, head.num_classes) == ("UPerHead", 16, 7)
    auxiliary = found.architecture.auxiliary_head
    assert auxiliary is not None
    assert (auxiliary.in_index, auxiliary.num_convs, auxiliary.concat_input) == ((2,), 1, False)
    assert found.architecture.classes == tuple(index["classes"])
    assert [list(colour) for colour in found.architecture.palette] == index["palette"]
    assert found.architecture.preprocessing.scale == (256, 128)
    assert found.architecture.preprocessing.mean == (123.675, 116.28, 103.53)
    # Neither config says these three; everything else was told.
    assert {fact.field for fact in found.assumed} == {
        "backbone.conv.fbm_cfg.max_size",
        "backbone.conv.fbm_cfg.masks",
        "auxiliary_head.dilation",
    }


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("upernet_r50_fdconv_kn64_c150", {"kernel_num": 64}),
        ("upernet_r50_fdconv_deepstem_kn32_c150", {"kernel_num": 32}),
        (
            "upernet_r50_fdconv_deepstem_kn64_cgt32_c150",
            {"kernel_num": 64, "use_fdconv_if_c_gt": 32},
        ),
        ("upernet_r50_plain_c150", None),
        ("upernet_r50_plain_deepstem_c150", None),
    ],
)
def test_segmentor_without_a_config_is_inferred_from_names_and_shapes(
    oracle: Path, name: str, fields: dict[str, Any] | None
) -> None:
    found = infer(key_list(oracle / "segmentor" / f"{name}_keys.json"))
    conv = None if fields is None else FDConvConfig(**fields)
    deep = "deepstem" in name
    assert found.architecture.backbone == ResNetConfig(depth=50, deep_stem=deep, conv=conv)
    assert found.architecture.decode_head.num_classes == 150
    assert found.architecture.decode_head.channels == 512
    assert found.architecture.auxiliary_head is not None
    assert found.architecture.auxiliary_head.in_index == (2,)
    assert "test.mode" in {fact.field for fact in found.assumed}
    assert all(fact.source == "published default" for fact in found.assumed)


@pytest.mark.parametrize(
    ("path", "depth", "dynamic"),
    [
        ("backbone/resnet18_fdconv_kn64_keys.json", 18, True),
        ("backbone/resnet50_plain_keys.json", 50, False),
        ("mmdet/mask_rcnn_r50_fpn_fdconv_kn64_c80_keys_mmdet2.28.1.json", 50, True),
        ("mmdet/faster_rcnn_r50_fpn_plain_c80_keys.json", 50, False),
    ],
)
def test_backbone_of_any_network_is_inferred(
    oracle: Path, path: str, depth: int, dynamic: bool
) -> None:
    state = key_list(oracle / path)
    backbone = infer_backbone(part(state, backbone_prefix(state)), Evidence())
    assert backbone.depth == depth
    assert (backbone.conv is not None and backbone.conv.kernel_num == 64) == dynamic


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["backbone.layer1.0.conv1.weight", "neck.x", "rpn_head.x"], "it is a detector"),
        (["backbone.layer1.0.conv1.weight"], "a backbone without a decode head"),
        (["layer1.0.conv1.weight", "conv1.weight"], "a backbone without a decode head"),
        (["layer1.0.conv1.weight", "fc.weight"], "it is a classifier"),
        (["blocks.0.attn.qkv.weight"], "none of its names is of a network known here"),
    ],
)
def test_segmentor_error_names_the_other_kind_of_network(names: list[str], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        infer({name: torch.empty(1) for name in names})


def test_segmentor_that_weights_describe_needs_no_config() -> None:
    architecture = small_architecture(auxiliary=True)
    silent = infer(shapes_of(architecture)).architecture
    assert silent.backbone == architecture.backbone
    assert silent.decode_head == architecture.decode_head
    assert silent.auxiliary_head == architecture.auxiliary_head
    loud = infer_config(shapes_of(architecture), config=parse_config(format_config(architecture)))
    assert loud.assumed[0].field == "classes"
    assert len(loud.assumed) == 2


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ("road", "class names in the checkpoint's meta are 'road', which is no list"),
        ({"road": 0}, "which is no list"),
        (["road"] * 3, "3 classes are named 'road' in the checkpoint's meta"),
        (["road", "car", "car"], "2 classes are named 'car'"),
    ],
)
def test_class_names_that_tell_nothing_are_said(classes: Any, says: str) -> None:
    meta = {"dataset_meta": {"classes": classes}}
    found = infer_config(shapes_of(small_architecture()), meta=meta)
    assert any(says in note for note in found.notes), found.notes


@pytest.mark.parametrize(
    ("meta", "values", "says"),
    [
        ({"CLASSES": ("a", "b")}, {}, r"meta says \('a', 'b'\), but the decode head makes 3"),
        ({"dataset_meta": {"classes": ("a",)}}, {}, "the decode head makes 3 classes"),
        ({}, {"model": {"decode_head": {"num_classes": 19}}}, "conv_seg makes 3"),
        ({}, {"model": {"decode_head": {"type": "PSPHead"}}}, "decode_head.type"),
        ({}, {"model": {"decode_head": {"in_channels": [1, 2, 3, 4]}}}, "in_channels"),
        ({}, {"model": {"decode_head": {"in_index": [3, 2, 1, 0]}}}, "in_index"),
        ({}, {"model": {"decode_head": {"in_index": [3, "a"]}}}, "in_index: .*not possible"),
        ({}, {"model": {"decode_head": {"pool_scales": [1, 2]}}}, "4 pooling branches"),
        ({}, {"model": {"decode_head": {"act_cfg": {"type": "GELU"}}}}, "act_cfg=GELU"),
        ({}, {"model": {"decode_head": {"act_cfg": None}}}, "act_cfg=None"),
        ({}, {"model": {"decode_head": {"norm_cfg": None}}}, "the weights have BatchNorms"),
        (
            {},
            {"model": {"decode_head": {"input_transform": "resize_concat"}}},
            "input_transform=resize_concat",
        ),
        ({}, {"model": {"type": "CascadeEncoderDecoder"}}, "is a CascadeEncoderDecoder"),
        ({}, {"model": {"test_cfg": {"mode": "slide"}}}, "test.crop_size is not known"),
        ({}, {"model": {"test_cfg": {"mode": "zigzag"}}}, "not possible"),
        ({}, {"model": {"data_preprocessor": {"mean": [1, 2]}}}, "preprocessing.mean"),
        (
            {},
            {"model": {"data_preprocessor": {"mean": [1, 2, 3], "std": [0, 1, 1]}}},
            "greater than 0",
        ),
    ],
)
def test_segmentor_whose_config_does_not_fit_is_refused(
    meta: dict[str, Any], values: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        infer_config(dynamic_state(), config=Config(values), meta=meta)


def test_auxiliary_head_not_known_here_is_left_out() -> None:
    state = dynamic_state() | {"auxiliary_head.x.weight": torch.empty(3)}
    found = infer(state)
    assert found.architecture.auxiliary_head is None
    assert any("auxiliary head is left out" in note for note in found.notes)
    several = dynamic_state() | {"auxiliary_head.0.conv_seg.weight": torch.empty(3)}
    assert any("several auxiliary heads" in note for note in infer(several).notes)
