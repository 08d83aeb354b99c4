"""Layers as their tensors tell them, against the published layer's own arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fdconv_deploy.checkpoints.state_dict import conv_layers, parameters


def cases(oracle: Path) -> list[tuple[str, dict[str, Any], dict[str, torch.Tensor]]]:
    found = []
    for case in json.loads((oracle / "layers" / "index.json").read_text())["cases"]:
        with safe_open(oracle / "layers" / case["file"], framework="pt") as file:
            state = {
                key.replace("state.", "layer1.0.conv1."): torch.empty(
                    file.get_slice(key).get_shape(), device="meta"
                )
                for key in file.keys()  # noqa: SIM118 - not a dict
                if key.startswith("state.")
            }
        found.append((case["file"], case["ctor"], state))
    return found


def test_layer_of_every_published_kind_is_understood(oracle: Path) -> None:
    seen = 0
    for file, arguments, state in cases(oracle):
        if "groups" in arguments:
            continue  # no dynamic layer has groups, and shapes alone don't tell them
        (layer,) = conv_layers(state)
        side = arguments["kernel_size"]
        kernel = (side, side) if isinstance(side, int) else tuple(side)
        assert layer.in_channels == arguments["in_channels"], file
        assert layer.out_channels == arguments["out_channels"], file
        assert layer.kernel == kernel, file
        assert layer.dynamic == (not file.startswith("plain_")), file
        if not layer.dynamic:
            continue
        seen += 1
        ratio = arguments.get("param_ratio", 1)
        groups = arguments.get("kernel_num", 4)
        if "kernel_num" in arguments and groups is None:
            groups = arguments["out_channels"] // 2
        assert layer.attentions == groups * ratio, file
        converted = arguments.get("convert_param", True)
        assert layer.convert_param == converted, file
        assert layer.param_ratio == (ratio if converted else None), file
        assert layer.linear_mode == (arguments.get("linear_mode", False) and not converted), file
        assert layer.use_ksm_local == arguments.get("use_ksm_local", True), file
        assert layer.ksm_only_kernel_att == arguments.get("ksm_only_kernel_att", False), file
        kept = int(layer.bins * min(arguments.get("param_reduction", 1.0), 1.0))
        assert layer.kept_bins == kept, file
    assert seen > 40


def test_parameters_leave_statistics_out() -> None:
    state = {
        "bn.weight": torch.ones(3),
        "bn.running_mean": torch.ones(3),
        "bn.num_batches_tracked": torch.tensor(1),
    }
    assert parameters(state) == 3


@pytest.mark.parametrize("bottleneck", [True, False])
def test_layer_kernel_size_that_only_the_place_tells(bottleneck: bool) -> None:
    """A cut spectrum with nothing but kernel attention: the block says 1×1 or 3×3."""
    side = 1 if bottleneck else 3
    bins = 24 * side * (32 * side // 2 + 1)
    name = "layer1.0.conv1"
    state = {
        f"{name}.dft_weight": torch.empty(1, bins // 2, 2),
        f"{name}.KSM_Global.fc.weight": torch.empty(16, 32, 1, 1),
        f"{name}.KSM_Global.kernel_fc.weight": torch.empty(4, 16, 1, 1),
        "layer1.0.bn1.weight": torch.empty(24),
    }
    if bottleneck:
        state["layer1.0.conv3.weight"] = torch.empty(96, 24, 1, 1)
    layer = conv_layers(state)[0]
    assert (layer.out_channels, layer.kernel, layer.bins) == (24, (side, side), bins)
    assert layer.kept_bins == bins // 2


def test_a_weight_without_a_name_is_no_layer() -> None:
    assert conv_layers({"weight": torch.empty(4, 4, 3, 3)}) == []
