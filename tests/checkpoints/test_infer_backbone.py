"""The ResNet that names, shapes and a config describe, and backbones that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import (
    dynamic_state,
    infer,
    shapes_of,
    small_architecture,
)

FOUR_BANDS = Preprocessing(mean=(1.0,) * 4, std=(2.0,) * 4, loading="bands")


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 34},
        {"depth": 50},
        {"depth": 101, "base_channels": 4},
        {"depth": 152, "base_channels": 4},
        {"deep_stem": True, "stem_channels": 16},
        {"stem_channels": 12},
        {"num_stages": 3, "out_indices": (0, 1, 2)},
        {"num_stages": 1, "out_indices": (0,), "base_channels": 24},
        {"in_channels": 4, "preprocessing": FOUR_BANDS},
        {"depth": 50, "avg_down": True},
    ],
)
def test_backbone_fields_come_from_names_and_shapes(fields: dict[str, Any]) -> None:
    architecture = small_architecture(**fields)
    told = {"preprocessing": architecture.preprocessing.model_dump()}
    found = infer(shapes_of(architecture), overrides=told)
    assert found.architecture.backbone == architecture.backbone


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"depth": 50}, "backbone.depth: the config says 50, but the weights have .*basic"),
        ({"base_channels": 64}, "backbone.base_channels: the config says 64"),
        ({"deep_stem": True}, "backbone.deep_stem: the config says True"),
        ({"stem_channels": 64}, "stem makes 8 channels"),
        ({"num_stages": 3}, "backbone.num_stages: the config says 3"),
        ({"strides": [1, 2]}, "backbone.strides: .*4 stages"),
        ({"out_indices": [0, 4]}, r"backbone.out_indices: .*stages \[0, 1, 2, 3\]"),
        ({"out_indices": [1, 1]}, "backbone.out_indices: .*each once"),
        ({"out_indices": [1, "a"]}, "backbone.out_indices: .*not possible"),
        ({"dilations": [1, 1, 0, 1]}, "backbone.dilations: .*greater than or equal to 1"),
        ({"strides": [1, 10**9, 1, 1]}, "backbone.strides: .*less than or equal to 1000000"),
        ({"style": "tensorflow"}, "backbone.style: the config says 'tensorflow', .*not possible"),
        ({"depth": "x"}, "not possible"),
        ({"conv_cfg": None}, "has conv_cfg=None, but the weights have 7 FDConv layers"),
        ({"conv_cfg": {"type": "DCN"}}, "has conv_cfg="),
        ({"conv_cfg": {"kernel_num": 8}}, "kernel_num: the config says 8"),
        ({"conv_cfg": {"kernel_num": None}}, "kernel_num: the config says None"),
        ({"conv_cfg": {"param_ratio": 2}}, "param_ratio: the config says 2"),
        ({"conv_cfg": {"param_reduction": 0.5}}, "param_reduction: .*whole spectra"),
        ({"conv_cfg": {"convert_param": False}}, "convert_param"),
        ({"conv_cfg": {"use_ksm_local": False}}, "use_ksm_local"),
        ({"conv_cfg": {"use_fdconv_if_c_gt": 40}}, "plain up to 16 channels and FDConv from 32"),
        ({"conv_cfg": {"use_fdconv_if_k_in": [1]}}, "use_fdconv_if_k_in"),
        ({"conv_cfg": {"use_fbm_if_k_in": [1]}}, "use_fbm_if_k_in"),
        ({"conv_cfg": {"ksm_global_act": "softmax"}}, "softmax needs ksm_only_kernel_att"),
        ({"conv_cfg": {"reduction": 0.9}}, "reduction"),
        ({"conv_cfg": {"reduction": float("inf")}}, "reduction: .*finite number"),
        ({"conv_cfg": {"fbm_cfg": {"k_list": [2, float("nan"), 8]}}}, "k_list: .*finite number"),
        ({"conv_cfg": {"fbm_cfg": {"k_list": [2, 4, 8, 16]}}}, "k_list"),
        ({"conv_cfg": {"fbm_cfg": {"k_list": [2, 4, 8], "spatial_group": 2}}}, "spatial_group"),
        ({"conv_cfg": {"fbm_cfg": {"k_list": [2, 4, 8], "spatial": "cbam"}}}, "'conv' only"),
        ({"multi_grid": (1, 2, 4)}, "multi_grid"),
        ({"dcn": {"type": "DCN"}}, "dcn"),
        ({"type": "SwinTransformer"}, "is a SwinTransformer"),
        ({"norm_cfg": {"type": "GN"}}, "backbone.norm_cfg is a GN"),
        ({"norm_cfg": {"type": "BN", "eps": 1e-3}}, "eps=0.001"),
    ],
)
def test_backbone_that_contradicts_its_config_is_refused(
    section: dict[str, Any], says: str
) -> None:
    conv_cfg = section.get("conv_cfg", {})
    if isinstance(conv_cfg, dict):
        section = section | {"conv_cfg": {"type": "FDConv"} | conv_cfg}
    with pytest.raises(CheckpointError, match=says) as error:
        infer(dynamic_state(), {"backbone": section})
    assert str(error.value).endswith(".")


def test_backbone_of_a_stock_config_is_accepted() -> None:
    backbone = {
        "type": "ResNet_FDConv",
        "pretrained": None,
        "init_cfg": {"type": "Pretrained"},
        "frozen_stages": 1,
        "norm_eval": True,
        "norm_cfg": {"type": "SyncBN", "requires_grad": True},
        "contract_dilation": True,
        "with_cp": False,
        "need_grad_list": ["KSM"],
        "strides": (1, 2, 1, 1),
        "dilations": (1, 1, 2, 4),
        "conv_cfg": {
            "type": "FDConv",
            "use_fdconv_if_stride_in": [1],
            "att_grid": 1,
            "spatial_freq_decompose": False,
            "ksm_global_act": "tanh",
        },
    }
    found = infer(dynamic_state(), {"type": "mmseg.models.EncoderDecoder", "backbone": backbone})
    told = found.architecture.backbone
    assert (told.contract_dilation, told.strides, told.dilations) == (
        True,
        (1, 2, 1, 1),
        (1, 1, 2, 4),
    )
    assert told.conv is not None
    assert told.conv.ksm_global_act == "tanh"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda k: k.replace("layer1", "block1"), "stages|none known here"),
        (lambda k: k.replace("layer2", "layer7"), "without a gap"),
        (lambda k: k.replace("layer4.1", "layer4.2"), "without a gap"),
        (lambda k: k.replace("backbone.conv1", "backbone.patch_embed"), "none known here"),
    ],
)
def test_backbone_not_known_here_is_refused(change: Any, says: str) -> None:
    state = {change(k) if k.startswith("backbone.") else k: v for k, v in dynamic_state().items()}
    with pytest.raises(CheckpointError, match=says):
        infer(state)


def test_backbone_of_grouped_or_wide_convolutions_is_refused() -> None:
    state = shapes_of(small_architecture(depth=50, conv=None))
    grouped = state | {"backbone.layer1.0.conv2.weight": torch.empty(8, 2, 3, 3)}
    with pytest.raises(CheckpointError, match="grouped convolutions"):
        infer(grouped)
    wide = state | {"backbone.layer1.0.conv2.weight": torch.empty(16, 8, 3, 3)}
    with pytest.raises(CheckpointError, match="Wide ResNets and ResNeXt"):
        infer(wide)


def test_backbone_multi_grid_comes_from_the_config() -> None:
    state = dynamic_state()
    assert infer(state).architecture.backbone.multi_grid is None
    section = {"backbone": {"multi_grid": [1, 2]}}
    assert infer(state, section).architecture.backbone.multi_grid == (1, 2)
    with pytest.raises(CheckpointError, match="last stage has 2 blocks"):
        infer(state, {"backbone": {"multi_grid": [1, 2, 4]}})
