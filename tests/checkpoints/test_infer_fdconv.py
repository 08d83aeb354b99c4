"""The FDConv configuration that names and shapes of layers leave, and what contradicts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fdconv_deploy.config import BandModulationConfig, FDConvConfig
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import (
    dynamic_state,
    infer,
    shapes_of,
    small_architecture,
)


def conv_of(state: dict[str, Tensor], **more: Any) -> FDConvConfig:
    conv = infer(state, **more).architecture.backbone.conv
    assert conv is not None
    return conv


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
def test_fdconv_fields_come_from_names_and_shapes(fields: dict[str, Any]) -> None:
    expected = FDConvConfig(**fields)
    told = conv_of(dynamic_state(**fields))
    if "use_fdconv_if_c_gt" in fields:  # any threshold that explains the layers
        told = told.model_copy(update={"use_fdconv_if_c_gt": expected.use_fdconv_if_c_gt})
        assert shapes_of(small_architecture(conv=told)).keys() == dynamic_state(**fields).keys()
    if "reduction" in fields:
        told = told.model_copy(update={"reduction": expected.reduction})
    assert told == expected


def test_fdconv_kernel_sizes_and_strides_of_a_bottleneck() -> None:
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


def test_fdconv_linear_mode_comes_from_shapes() -> None:
    conv = FDConvConfig(convert_param=False, linear_mode=True, use_fdconv_if_k_in=(1,))
    assert conv_of(shapes_of(small_architecture(depth=50, conv=conv))) == conv


def test_fdconv_number_of_bands_is_ambiguous_and_noted() -> None:
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


def test_fdconv_layer_that_does_not_fit_together_is_refused() -> None:
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


def test_fdconv_layers_of_two_networks_are_refused() -> None:
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


def test_fdconv_config_of_plain_weights_is_refused() -> None:
    state = shapes_of(small_architecture(conv=None))
    with pytest.raises(CheckpointError, match=r"says FDConv, but .* plain.*convert_state_dict"):
        infer(state, {"backbone": {"conv_cfg": {"type": "FDConv"}}})
    # A threshold that leaves every layer plain explains them.
    conv = conv_of(
        state, model={"backbone": {"conv_cfg": {"type": "FDConv", "use_fdconv_if_c_gt": 64}}}
    )
    assert conv.use_fdconv_if_c_gt == 64
    assert infer(state).architecture.backbone.conv is None
