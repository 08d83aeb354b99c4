"""Heads and settings: told by weights and config alike, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fdconv_deploy.checkpoints import Inference, infer_segmentor_config, parse_config
from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.evidence import Setting
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import dynamic_state, head_config, infer, shapes_of, small_architecture


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
    found = infer_segmentor_config(dynamic_state(), config=parse_config(text))
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
    found = infer_segmentor_config(dynamic_state(), config=parse_config(text)).architecture
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
    found = infer_segmentor_config(dynamic_state(), config=parse_config(text))
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
        ({}, {"model": {"decode_head": {"act_cfg": None}}}, "act_cfg=None"),
        ({}, {"model": {"decode_head": {"norm_cfg": None}}}, "the weights have BatchNorms"),
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
        infer_segmentor_config(dynamic_state(), config=Config(values), meta=meta)


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


def state_with(**head: Any) -> dict[str, torch.Tensor]:
    """Shapes of a small network, outputs of 8, 16, 32 and 64 channels, with another head."""
    common = {"in_channels": (64,), "in_index": (3,), "channels": 8, "num_classes": 3}
    config = head_config(**(common | head))
    return shapes_of(small_architecture().model_copy(update={"decode_head": config}))


def fact_of(found: Inference, field: str) -> Setting:
    return next(fact for fact in (*found.found, *found.assumed) if fact.field == field)


def test_dilations_are_assumed_aloud_and_must_fit_the_kernels() -> None:
    state = state_with(type="ASPPHead", dilations=(1, 12, 24, 36))
    found = infer(state)
    assert found.architecture.decode_head.dilations == (1, 12, 24, 36)
    fact = fact_of(found, "decode_head.dilations")
    assert (fact.source, "stock d8" in fact.note) == ("published default", True)
    # A config that is silent means the class's own default, not a stock config's.
    silent = infer(state, {"decode_head": {"type": "ASPPHead"}, "backbone": {"type": "ResNet"}})
    assert silent.architecture.decode_head.dilations == (1, 6, 12, 18)
    assert silent.architecture.backbone.strides == (1, 2, 2, 2)
    given = infer(state, {"decode_head": {"dilations": [1, 2, 3, 4]}})
    assert fact_of(given, "decode_head.dilations").source == "config"
    for wrong in ([2, 1, 3, 4], [1, 2, 3], [1, 0, 3, 4]):
        with pytest.raises(CheckpointError, match=r"1×1, 3×3, 3×3, 3×3 kernels"):
            infer(state, {"decode_head": {"dilations": wrong}})
    with pytest.raises(CheckpointError, match=r"decode_head\.dilations is not known"):
        infer(state_with(type="DepthwiseSeparableASPPHead", dilations=(2, 4)))


def test_a_finer_map_is_the_first_output() -> None:
    head = {"type": "DepthwiseSeparableASPPHead", "c1_in_channels": 8, "c1_channels": 5}
    found = infer(state_with(**head))
    head_found = found.architecture.decode_head
    assert (head_found.c1_in_channels, head_found.c1_channels) == (8, 5)
    assert fact_of(found, "decode_head.c1_channels").source == "shapes"
    with pytest.raises(CheckpointError, match=r"decode_head\.c1_channels"):
        infer(state_with(**head), {"decode_head": {"c1_channels": 48}})
    other = state_with(**(head | {"c1_in_channels": 16}))
    with pytest.raises(CheckpointError, match=r"c1_bottleneck takes 16 channels, and .* has 8"):
        infer(other)


@pytest.mark.parametrize("kind", ["PSPHead", "ASPPHead", "FCNHead", "DepthwiseSeparableASPPHead"])
def test_joined_maps_are_told_by_their_channels(kind: str) -> None:
    joined = {"in_channels": (64, 8, 32), "in_index": (3, 0, 2), "input_transform": "resize_concat"}
    state = state_with(type=kind, **joined)
    found = infer(state).architecture.decode_head
    assert (found.input_transform, found.in_index) == ("resize_concat", (0, 2, 3))
    assert fact_of(infer(state), "decode_head.in_index").source == "published default"
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


def test_one_joined_map_is_that_map() -> None:
    state = state_with(type="PSPHead")
    section = {"input_transform": "resize_concat", "in_index": [3], "in_channels": [64]}
    assert infer(state, {"decode_head": section}).architecture.decode_head.in_index == (3,)


def test_heads_without_normalisation() -> None:
    state = state_with(type="PSPHead", norm=False)
    found = infer(state)
    assert found.architecture.decode_head.norm is False
    assert fact_of(found, "decode_head.norm").source == "names"
    with pytest.raises(CheckpointError, match=r"decode_head\.norm: .* biases and no normalisation"):
        infer(state, {"decode_head": {"norm_cfg": {"type": "BN"}}})


def test_other_normalisations_of_heads_are_refused_by_name() -> None:
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
def test_heads_with_tensors_missing_are_refused(kind: str, lost: str) -> None:
    state = state_with(type=kind)
    cut = {k: v for k, v in state.items() if not k.startswith(f"decode_head.{lost}.")}
    if len(cut) < len(state):
        with pytest.raises(CheckpointError, match="decode_head is of an unknown type"):
            infer(cut)
    flat = {k: v.flatten() if f"head.{lost}." in k else v for k, v in state.items()}
    if lost != "bottleneck" and len(cut) < len(state):
        with pytest.raises(CheckpointError, match=r"has shape \(\d+,\). Expected a convolution"):
            infer(flat)


def test_multi_grid_comes_from_the_config() -> None:
    state = dynamic_state()
    assert infer(state).architecture.backbone.multi_grid is None
    section = {"backbone": {"multi_grid": [1, 2]}}
    assert infer(state, section).architecture.backbone.multi_grid == (1, 2)
    with pytest.raises(CheckpointError, match="last stage has 2 blocks"):
        infer(state, {"backbone": {"multi_grid": [1, 2, 4]}})
