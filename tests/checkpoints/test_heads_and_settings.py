"""Heads and settings: told by weights and config alike, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fdconv_deploy.checkpoints import infer_architecture, parse_config
from fdconv_deploy.checkpoints.config_text import Config
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import dynamic_state, infer


def test_settings_of_mmseg_0() -> None:
    text = """
img_norm_cfg = dict(mean=[1.0, 2, 3], std=[4, 5, 6], to_rgb=False)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(512, 2048), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'),
        dict(type='Normalize', **img_norm_cfg), dict(type='Pad', size_divisor=32),
        dict(type='ImageToTensor', keys=['img']), dict(type='Collect', keys=['img'])])]
test_cfg = dict(mode='slide', crop_size=(512, 512), stride=341)
data = dict(test=dict(classes=['a', 'b', 'c'], palette=[[1, 2, 3]]))
"""
    found = infer_architecture(dynamic_state(), config=parse_config(text))
    settings = found.architecture.preprocessing
    assert (settings.mean, settings.std, settings.bgr_to_rgb) == ((1, 2, 3), (4, 5, 6), False)
    assert settings.scale == (2048, 512)
    test = found.architecture.test
    assert (test.mode, test.crop_size, test.stride) == ("slide", (512, 512), (341, 341))
    assert found.architecture.classes == ("a", "b", "c")
    assert found.architecture.palette == ()
    assert any("Pad step" in note for note in found.notes)
    assert any("palette in the config is not one RGB colour" in note for note in found.notes)


def test_settings_of_mmseg_1() -> None:
    text = """
model = dict(data_preprocessor=dict(type='SegDataPreProcessor', mean=None))
train_cfg = dict(type='IterBasedTrainLoop')
test_cfg = dict(type='TestLoop')
test_dataloader = dict(dataset=dict(metainfo=dict(classes=('a', 'b', 'c')), pipeline=[
    dict(type='Resize', scale=(300, 200), keep_ratio=False)]))
"""
    found = infer_architecture(dynamic_state(), config=parse_config(text)).architecture
    assert found.preprocessing.mean == (0, 0, 0)
    assert found.preprocessing.std == (1, 1, 1)
    assert (found.preprocessing.scale, found.preprocessing.keep_ratio) == ((300, 200), False)
    assert found.test.mode == "whole"
    assert found.classes == ("a", "b", "c")


def test_of_several_scales_the_first_is_used() -> None:
    text = """
data = dict(test=dict(pipeline=[
    dict(type='MultiScaleFlipAug', img_scale=[(1024, 512), (2048, 1024)], transforms=[
        dict(type='Resize', keep_ratio=True)])]))
"""
    found = infer_architecture(dynamic_state(), config=parse_config(text))
    assert found.architecture.preprocessing.scale == (1024, 512)
    assert any("has 2 scales; the first is used" in note for note in found.notes)


@pytest.mark.parametrize(
    ("meta", "values", "says"),
    [
        ({"CLASSES": ("a", "b")}, {}, r"meta says \('a', 'b'\), but the decode head makes 3"),
        ({"dataset_meta": {"classes": ("a",)}}, {}, "the decode head makes 3 classes"),
        ({}, {"model": {"decode_head": {"num_classes": 19}}}, "conv_seg makes 3"),
        ({}, {"model": {"decode_head": {"type": "PSPHead"}}}, "decode_head.type"),
        ({}, {"model": {"decode_head": {"in_channels": [1, 2, 3, 4]}}}, "in_channels"),
        ({}, {"model": {"decode_head": {"in_index": [3, 2, 1, 0]}}}, "in_index"),
        ({}, {"model": {"decode_head": {"pool_scales": [1, 2]}}}, "4 pooling branches"),
        ({}, {"model": {"decode_head": {"act_cfg": {"type": "GELU"}}}}, "act_cfg=GELU"),
        (
            {},
            {"model": {"decode_head": {"input_transform": "resize_concat"}}},
            "input_transform='resize_concat'",
        ),
        ({}, {"model": {"type": "CascadeEncoderDecoder"}}, "is a CascadeEncoderDecoder"),
        ({}, {"model": {"test_cfg": {"mode": "slide"}}}, "test.crop_size is not known"),
        ({}, {"model": {"test_cfg": {"mode": "zigzag"}}}, "not possible"),
        ({}, {"model": {"data_preprocessor": {"mean": [1, 2]}}}, "preprocessing.mean"),
        ({}, {"model": {"data_preprocessor": {"mean": [1, 2, 3], "std": [0, 1, 1]}}}, "above 0"),
    ],
)
def test_heads_and_settings_that_do_not_fit(
    meta: dict[str, Any], values: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        infer_architecture(dynamic_state(), config=Config(values), meta=meta)


def test_heads_not_known_here() -> None:
    state = dynamic_state()
    with pytest.raises(CheckpointError, match="decode_head is a SegformerHead: it has fusion_conv"):
        infer(
            {k: v for k, v in state.items() if k.startswith("backbone.")}
            | {"decode_head.fusion_conv.conv.weight": torch.empty(1, 1, 1, 1)},
            {"decode_head": {"type": "SegformerHead"}},
        )
    moved = {k.replace("backbone.layer4.1.conv2", "decode_head.x"): v for k, v in state.items()}
    with pytest.raises(CheckpointError, match=r"decode_head\.x is an FDConv layer"):
        infer(moved)
    with pytest.raises(CheckpointError, match="has a neck"):
        infer(state | {"neck.lateral.weight": torch.empty(1)})
    wide = state | {"decode_head.lateral_convs.0.conv.weight": torch.empty(8, 99, 1, 1)}
    with pytest.raises(CheckpointError, match="takes feature maps of 99 channels"):
        infer(wide)


def test_auxiliary_heads_not_known_here_are_left_out() -> None:
    state = dynamic_state() | {"auxiliary_head.x.weight": torch.empty(3)}
    found = infer(state)
    assert found.architecture.auxiliary_head is None
    assert any("auxiliary head is left out" in note for note in found.notes)
    several = dynamic_state() | {"auxiliary_head.0.conv_seg.weight": torch.empty(3)}
    assert any("several auxiliary heads" in note for note in infer(several).notes)
