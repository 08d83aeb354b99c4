"""What names and shapes tell always holds; the rest is told by others or assumed aloud."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdconv_deploy.checkpoints import (
    format_config,
    infer_segmentor_config,
    parse_config,
    read_checkpoint,
)
from fdconv_deploy.checkpoints.config_parser import config_of
from fdconv_deploy.checkpoints.infer_segmentor import infer_backbone_only
from fdconv_deploy.config import BackboneConfig, BandModulationConfig, FDConvConfig, Preprocessing
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import (
    CLASSES,
    dynamic_state,
    infer,
    key_list,
    shapes_of,
    small_architecture,
)

FOUR_BANDS = Preprocessing(mean=(1.0,) * 4, std=(2.0,) * 4, loading="bands")


def conv_of(state: dict[str, Tensor], **more: Any) -> FDConvConfig:
    conv = infer(state, **more).architecture.backbone.conv
    assert conv is not None
    return conv


@pytest.mark.parametrize("name", ["mmcv1", "mmengine_published"])
def test_reference_checkpoint_is_told_in_full(oracle: Path, name: str) -> None:
    checkpoint = read_checkpoint(oracle / "segmentor" / f"B_r18b14_{name}.pth")
    index = json.loads((oracle / "segmentor" / "index.json").read_text())
    model = index["models"]["B"]["model"]
    found = infer_segmentor_config(
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
def test_key_lists_tell_without_a_config(
    oracle: Path, name: str, fields: dict[str, Any] | None
) -> None:
    found = infer(key_list(oracle / "segmentor" / f"{name}_keys.json"))
    conv = None if fields is None else FDConvConfig(**fields)
    deep = "deepstem" in name
    assert found.architecture.backbone == BackboneConfig(depth=50, deep_stem=deep, conv=conv)
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
def test_backbones_of_anything(oracle: Path, path: str, depth: int, dynamic: bool) -> None:
    backbone = infer_backbone_only(key_list(oracle / path)).architecture
    assert backbone.depth == depth
    assert (backbone.conv is not None and backbone.conv.kernel_num == 64) == dynamic


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel_num": 8},
        {"kernel_num": None},
        {"param_ratio": 2},
        {"param_reduction": 0.5},
        {"param_reduction": 0.5, "ksm_only_kernel_att": True},
        {"convert_param": False},
        {"use_ksm_local": False},
        {"ksm_only_kernel_att": True},
        {"ksm_only_kernel_att": True, "use_ksm_local": False},
        {"reduction": 0.9},
        {"use_fdconv_if_c_gt": 40},
        {"use_fdconv_if_c_gt": 4},
        {"use_fbm_if_k_in": ()},
        {"use_fbm_if_k_in": (), "use_fbm_for_stride": True},
        {"fbm_cfg": BandModulationConfig(lowfreq_att=True)},
        {"fbm_cfg": BandModulationConfig(k_list=(2,))},
        {"fbm_cfg": BandModulationConfig(spatial_group=4)},
        {"fbm_cfg": BandModulationConfig(spatial_group=65)},
        {"fbm_cfg": BandModulationConfig(spatial_kernel=1)},
    ],
)
def test_fields_that_names_and_shapes_tell(fields: dict[str, Any]) -> None:
    expected = FDConvConfig(**fields)
    told = conv_of(dynamic_state(**fields))
    if "use_fdconv_if_c_gt" in fields:  # any threshold that explains the layers
        told = told.model_copy(update={"use_fdconv_if_c_gt": expected.use_fdconv_if_c_gt})
        assert shapes_of(small_architecture(conv=told)).keys() == dynamic_state(**fields).keys()
    if "reduction" in fields:
        told = told.model_copy(update={"reduction": expected.reduction})
    assert told == expected


def test_kernel_sizes_and_strides_of_a_bottleneck() -> None:
    for fields in (
        {"use_fdconv_if_k_in": (3,)},
        {"use_fdconv_if_k_in": (1,), "use_fbm_if_k_in": (1,)},
        {"use_fbm_if_k_in": (1, 3)},
        {"use_fbm_for_stride": True, "use_fbm_if_k_in": ()},
    ):
        state = shapes_of(small_architecture(depth=50, conv=FDConvConfig(**fields)))
        assert conv_of(state) == FDConvConfig(**fields), fields
    # A stride on the 1×1s shows where FBM follows strides: that tells the style.
    conv = FDConvConfig(use_fbm_if_k_in=(3,), use_fbm_for_stride=True)
    state = shapes_of(small_architecture(depth=50, conv=conv, style="caffe"))
    found = infer(state)
    assert found.architecture.backbone.style == "caffe"
    assert "backbone.style" in {fact.field for fact in found.found}


def test_linear_mode() -> None:
    conv = FDConvConfig(convert_param=False, linear_mode=True, use_fdconv_if_k_in=(1,))
    assert conv_of(shapes_of(small_architecture(depth=50, conv=conv))) == conv


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
def test_backbone_fields_that_names_and_shapes_tell(fields: dict[str, Any]) -> None:
    architecture = small_architecture(**fields)
    told = {"preprocessing": architecture.preprocessing.model_dump()}
    found = infer(shapes_of(architecture), overrides=told)
    assert found.architecture.backbone == architecture.backbone


def test_number_of_bands_is_ambiguous_and_says_so() -> None:
    found = infer(dynamic_state())
    (fact,) = [fact for fact in found.assumed if fact.field.endswith("k_list")]
    assert fact.note == "3 convolutions a layer: 3 bands, or 2 and lowfreq_att"
    model = {"backbone": {"conv_cfg": {"type": "FDConv"}}}
    bands = {"k_list": [2, 4], "lowfreq_att": True}
    model["backbone"]["conv_cfg"]["fbm_cfg"] = bands
    conv = conv_of(dynamic_state(), model=model)
    assert (conv.fbm_cfg.k_list, conv.fbm_cfg.lowfreq_att) == ((2, 4), True)
    bands["lowfreq_att"] = False
    with pytest.raises(
        CheckpointError, match=r"lowfreq_att: the config says False, but .*leaves 1"
    ):
        infer(dynamic_state(), model=model)
    two = dynamic_state(fbm_cfg=BandModulationConfig(k_list=(2, 4)))
    with pytest.raises(CheckpointError, match=r"k_list is not known: .* 2 band convolutions"):
        infer(two)
    overrides = {"backbone.conv.fbm_cfg.k_list": (2, 4)}
    assert conv_of(two, overrides=overrides).fbm_cfg.k_list == (2, 4)
    # The published code reads an fbm_cfg without k_list as one band.
    model["backbone"]["conv_cfg"]["fbm_cfg"] = {"lowfreq_att": True}
    conv = conv_of(two, model=model)
    assert (conv.fbm_cfg.k_list, conv.fbm_cfg.lowfreq_att) == ((2,), True)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"depth": 50}, "backbone.depth: the config says 50, but the weights have .*basic"),
        ({"base_channels": 64}, "backbone.base_channels: the config says 64"),
        ({"deep_stem": True}, "backbone.deep_stem: the config says True"),
        ({"stem_channels": 64}, "stem makes 8 channels"),
        ({"num_stages": 3}, "backbone.num_stages: the config says 3"),
        ({"strides": [1, 2]}, "backbone.strides: .*4 stages"),
        ({"out_indices": [0, 4]}, "backbone.out_indices: .*stages 0 to 3"),
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
        ({"conv_cfg": {"fbm_cfg": {"k_list": [2, 4, 8, 16]}}}, "k_list"),
        ({"conv_cfg": {"fbm_cfg": {"k_list": [2, 4, 8], "spatial_group": 2}}}, "spatial_group"),
        ({"conv_cfg": {"fbm_cfg": {"k_list": [2, 4, 8], "spatial": "cbam"}}}, "'conv' only"),
        ({"multi_grid": (1, 2, 4)}, "multi_grid"),
        ({"dcn": {"type": "DCN"}}, "dcn"),
        ({"type": "SwinTransformer"}, "is a SwinTransformer"),
        ({"norm_cfg": {"type": "GN"}}, "normalises with GN"),
        ({"norm_cfg": {"type": "BN", "eps": 1e-3}}, "eps=0.001"),
    ],
)
def test_config_that_contradicts_the_weights(section: dict[str, Any], says: str) -> None:
    conv_cfg = section.get("conv_cfg", {})
    if isinstance(conv_cfg, dict):
        section = section | {"conv_cfg": {"type": "FDConv"} | conv_cfg}
    with pytest.raises(CheckpointError, match=says) as error:
        infer(dynamic_state(), {"backbone": section})
    assert str(error.value).endswith(".")


def test_stock_configs_are_accepted() -> None:
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
        (lambda k: k.replace("layer1", "block1"), "stages|not a ResNet"),
        (lambda k: k.replace("layer2", "layer7"), "without a gap"),
        (lambda k: k.replace("layer4.1", "layer4.2"), "blocks in its stages"),
        (lambda k: k.replace("backbone.conv1", "backbone.patch_embed"), "not a ResNet"),
    ],
)
def test_backbones_not_known_here(change: Any, says: str) -> None:
    state = {change(k) if k.startswith("backbone.") else k: v for k, v in dynamic_state().items()}
    with pytest.raises(CheckpointError, match=says):
        infer(state)


def test_grouped_and_wide_backbones() -> None:
    state = shapes_of(small_architecture(depth=50, conv=None))
    grouped = state | {"backbone.layer1.0.conv2.weight": torch.empty(8, 2, 3, 3)}
    with pytest.raises(CheckpointError, match="grouped convolutions"):
        infer(grouped)
    wide = state | {"backbone.layer1.0.conv2.weight": torch.empty(16, 8, 3, 3)}
    with pytest.raises(CheckpointError, match="Wide ResNets and ResNeXt"):
        infer(wide)


def test_layers_that_do_not_fit_together() -> None:
    state = dynamic_state()
    name = "backbone.layer3.0.conv2."
    with pytest.raises(CheckpointError, match=r"layer3\.0\.conv2 does not fit .*: dft_weight"):
        infer(state | {f"{name}dft_weight": torch.empty(1, 95, 49, 2)})
    with pytest.raises(CheckpointError, match="no dft_weight and no weight"):
        infer({k: v for k, v in state.items() if k != f"{name}dft_weight"})
    with pytest.raises(CheckpointError, match="KSM_Local makes 7"):
        infer(state | {f"{name}KSM_Local.conv.weight": torch.empty(7, 1, 3)})
    without = {k: v for k, v in state.items() if not k.startswith(f"{name}KSM_Local")}
    with pytest.raises(CheckpointError, match="use_ksm_local differs between layers"):
        infer(without)
    with pytest.raises(CheckpointError, match="kernel_num differs"):
        infer(state | {f"{name}KSM_Global.kernel_fc.weight": torch.empty(6, 16, 1, 1)})
    bare = {k: v for k, v in state.items() if not k.startswith(name)}
    with pytest.raises(CheckpointError, match="follows no channel threshold"):
        infer(bare | {f"{name}weight": torch.empty(32, 32, 3, 3)})
    no_bands = {k: v for k, v in state.items() if not k.startswith(f"{name}FBM")}
    with pytest.raises(CheckpointError, match="neither kernel size nor stride"):
        infer(no_bands)


def test_layers_of_two_networks() -> None:
    """One layer's shapes differ from the others' where one setting tells all."""
    state = dynamic_state()
    name = "backbone.layer4.1.conv2."
    bands = f"{name}FBM.freq_weight_conv_list"
    fewer = {key: value for key, value in state.items() if not key.startswith(f"{bands}.2")}
    wider = {f"{bands}.{j}.weight": torch.empty(1, 64, 5, 5) for j in range(3)}
    for mixed in (fewer, state | wider):
        with pytest.raises(CheckpointError, match="number of bands or in spatial_kernel"):
            infer(mixed)
    grouped = {f"{bands}.{j}.weight": torch.empty(2, 32, 3, 3) for j in range(3)}
    with pytest.raises(CheckpointError, match=r"spatial_group differs between layers \(\[1, 2\]\)"):
        infer(state | grouped)
    cut = {f"{name}dft_weight": torch.empty(1, 192 * 97 // 2, 2)}
    with pytest.raises(CheckpointError, match=r"layer4\.1\.conv2 stores part of its spectrum"):
        infer(state | cut)


def test_overrides() -> None:
    state = shapes_of(small_architecture(depth=50))
    found = infer(
        state,
        {"backbone": {"style": "pytorch", "conv_cfg": {"type": "FDConv", "att_multi": 2.0}}},
        overrides={
            "backbone.style": "caffe",
            "backbone": {"conv": {"att_multi": 1.5}},
            "classes": list(CLASSES),
            "preprocessing.mean": [1, 2, 3],
        },
    )
    assert found.architecture.backbone.style == "caffe"
    assert found.architecture.backbone.conv is not None
    assert found.architecture.backbone.conv.att_multi == 1.5
    assert found.architecture.classes == CLASSES
    sources = {fact.field: fact.source for fact in found.found}
    assert sources["backbone.style"] == sources["classes"] == "command line"
    with pytest.raises(CheckpointError, match=r"'backbone\.stile'.*Did you mean backbone\.style"):
        infer(state, overrides={"backbone.stile": "caffe"})
    with pytest.raises(CheckpointError, match="the command line says 18, but"):
        infer(state, overrides={"backbone.depth": 18})


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
def test_other_networks_are_named(names: list[str], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        infer({name: torch.empty(1) for name in names})


def test_plain_weights_with_an_fdconv_config() -> None:
    state = shapes_of(small_architecture(conv=None))
    with pytest.raises(CheckpointError, match=r"says FDConv, but .* plain.*convert_state_dict"):
        infer(state, {"backbone": {"conv_cfg": {"type": "FDConv"}}})
    # A threshold that leaves every layer plain explains them.
    conv = conv_of(
        state, model={"backbone": {"conv_cfg": {"type": "FDConv", "use_fdconv_if_c_gt": 64}}}
    )
    assert conv.use_fdconv_if_c_gt == 64
    assert infer(state).architecture.backbone.conv is None


def test_unreadable_config_values_count_as_silence() -> None:
    text = "model = dict(backbone=dict(style=f(), strides=[1, g(), 2, 2]))"
    found = infer_segmentor_config(dynamic_state(), config=parse_config(text))
    assert found.architecture.backbone.strides == (1, 2, 2, 2)
    assert "backbone.strides" in {fact.field for fact in found.assumed}
    assert len(found.notes) == 2


def test_everything_the_weights_tell_needs_no_config() -> None:
    architecture = small_architecture(auxiliary=True)
    silent = infer(shapes_of(architecture)).architecture
    assert silent.backbone == architecture.backbone
    assert silent.decode_head == architecture.decode_head
    assert silent.auxiliary_head == architecture.auxiliary_head
    loud = infer_segmentor_config(
        shapes_of(architecture), config=parse_config(format_config(architecture))
    )
    assert loud.assumed[0].field == "classes"
    assert len(loud.assumed) == 2
