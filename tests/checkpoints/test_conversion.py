"""Plain weights → FDConv weights, as the published converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fdconv_deploy.checkpoints import convert_state_dict, read_checkpoint
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn import FDConv2d

NAMES = ("resnet_torchvision_style", "resnet_state_dict_wrapped", "mit_mmseg", "vit_mmseg")


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_published_converter(oracle: Path, name: str) -> None:
    folder = oracle / "convert"
    given = read_checkpoint(folder / f"{name}_in.pth").state_dict
    expected = read_checkpoint(folder / f"{name}_out.pth").state_dict
    cases = {case["input"]: case for case in json.loads((folder / "index.json").read_text())}
    found = convert_state_dict(given)
    assert found.keys() == expected.keys()
    converted = [key for key in found if key.endswith("dft_weight")]
    assert sorted(converted) == sorted(cases[f"{name}_in.pth"]["converted"])
    for key, value in expected.items():
        largest = float(value.abs().max()) if value.numel() else 0.0
        assert found[key].shape == value.shape
        assert float((found[key] - value).abs().max()) <= 1e-6 * max(largest, 1.0), key


@pytest.mark.parametrize("ratio", [1, 2])
def test_fills_a_layer_of_the_network(ratio: int) -> None:
    plain = torch.nn.Conv2d(32, 48, 3, padding=1, bias=False)
    converted = convert_state_dict({"layer1.0.conv1.weight": plain.weight}, param_ratio=ratio)
    spectrum = converted["layer1.0.conv1.dft_weight"]
    layer = FDConv2d(32, 48, 3, padding=1, bias=False, param_ratio=ratio)
    assert layer.dft_weight.shape == spectrum.shape
    layer.load_state_dict({"dft_weight": spectrum}, strict=False)
    # alpha holds groups × ratio, and as many copies as ratio are summed.
    groups = layer.kernel_num * ratio
    matrix = layer.kernel_matrix(torch.full((1, groups), 1 / groups / ratio))
    kernel = matrix.reshape(48, 3, 32, 3).transpose(1, 2)
    x = torch.randn(1, 32, 8, 8)
    assert torch.allclose(F.conv2d(x, kernel, padding=1), plain(x), atol=1e-5)


def test_thresholds() -> None:
    weights = {
        "stem.3.weight": torch.ones(32, 32, 3, 3),
        "layer1.0.conv1.weight": torch.ones(24, 24, 1, 1),
        "layer1.0.downsample.0.weight": torch.ones(64, 64, 1, 1),
        "decode_head.fpn_convs.0.conv.weight": torch.ones(64, 64, 3, 3),
        "conv1.weight": torch.ones(64, 64, 7, 7),
    }
    assert [k for k in convert_state_dict(weights) if "dft" in k] == ["stem.3.dft_weight"]
    lower = convert_state_dict(weights, use_fdconv_if_c_gt=16, use_fdconv_if_k_in=(1,))
    assert [k for k in lower if "dft" in k] == ["layer1.0.conv1.dft_weight"]
    assert weights["stem.3.weight"].shape == (32, 32, 3, 3)


def test_converted_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match="FDConv network already"):
        convert_state_dict({"layer1.0.conv1.dft_weight": torch.ones(1)})
