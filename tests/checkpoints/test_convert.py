"""Plain weights → FDConv weights, as the published converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fdconv_deploy.checkpoints import (
    Conversion,
    convert_state_dict,
    equivalent_state_dict,
    read_checkpoint,
)
from fdconv_deploy.checkpoints.convert import describe_conversion
from fdconv_deploy.config import BackboneConfig, FDConvConfig
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError
from fdconv_deploy.folding.network import dynamic_layers
from fdconv_deploy.nn import FDConv2d, ResNet
from tests.reference.lively import error

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


def plain_resnet(depth: int = 18, seed: int = 0, **fields: object) -> ResNet:
    """With statistics and scales that do something."""
    torch.manual_seed(seed)
    network = ResNet(BackboneConfig(depth=depth, base_channels=18, conv=None, **fields)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return network


CONVS = [
    FDConvConfig(kernel_num=6),
    FDConvConfig(kernel_num=3, param_ratio=2, use_ksm_local=False, att_multi=1.5),
    FDConvConfig(kernel_num=6, use_fbm_for_stride=True, use_fbm_if_k_in=(), kernel_temp=0.5),
    FDConvConfig(kernel_num=2, convert_param=False, ksm_global_act="tanh"),
    FDConvConfig(kernel_num=6, param_reduction=2.0, ksm_only_kernel_att=True),
]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("conv", CONVS, ids=["published", "gates", "strides", "spatial", "kernel"])
@torch.no_grad()
def test_equivalent_network(conv: FDConvConfig, depth: int) -> None:
    fields: dict[str, object] = {"deep_stem": depth == 50, "avg_down": depth == 50}
    plain = plain_resnet(depth, num_stages=2, out_indices=(0, 1), **fields)
    state = {f"backbone.{k}": v for k, v in plain.state_dict().items()} | {"fc.bias": torch.ones(3)}
    config = plain.config.model_copy(update={"conv": conv})
    made = equivalent_state_dict(state, config)
    assert torch.equal(made.pop("fc.bias"), torch.ones(3))
    network = ResNet(config).eval()
    network.load_state_dict({k.removeprefix("backbone."): v for k, v in made.items()})
    assert len(dynamic_layers(network)) >= 8
    x = torch.randn(2, 3, 64, 80)
    for ours, theirs in zip(network(x), plain(x), strict=True):
        assert error(ours, theirs) <= 1e-5
    report = describe_conversion(state, made, conv, "equivalent")
    assert len(report.converted) == len(dynamic_layers(network))
    assert not report.left_random


def test_equivalent_weights_are_the_same_each_time() -> None:
    plain = plain_resnet(num_stages=1, out_indices=(0,))
    config = plain.config.model_copy(update={"conv": FDConvConfig()})
    first, second = (equivalent_state_dict(plain.state_dict(), config) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_networks_have_no_equivalent() -> None:
    plain = plain_resnet(num_stages=1, out_indices=(0,))
    config = plain.config.model_copy(update={"conv": FDConvConfig(), "base_channels": 20})
    with pytest.raises(CheckpointError, match=r"with conv1\.weight \(20, 3.*found \(18, 3"):
        equivalent_state_dict(plain.state_dict(), config)
    cut = plain.config.model_copy(update={"conv": FDConvConfig(param_reduction=0.5)})
    with pytest.raises(UnsupportedLayerError, match="keeps part of the spectrum only"):
        equivalent_state_dict(plain.state_dict(), cut)


def test_what_is_passed_over_is_told(oracle: Path) -> None:
    def described(name: str) -> Conversion:
        state = read_checkpoint(oracle / "convert" / f"{name}_in.pth").state_dict
        return describe_conversion(state, convert_state_dict(state), FDConvConfig())

    resnet = described("resnet_torchvision_style")
    assert len(resnet.converted) == 8
    assert resnet.left_random == ("layer3.0.conv1", "layer3.0.conv2")
    assert resnet.grouped == resnet.unrecognised == ()
    mit = described("mit_mmseg")
    assert mit.converted == ()
    # Those above 16 channels, and not the depthwise convolutions between them.
    assert len(mit.unrecognised) == 6
    assert mit.unrecognised[0] == "layers.1.1.0.ffn.layers.0"
    vit = described("vit_mmseg")
    assert (len(vit.converted), vit.left_random, vit.unrecognised) == (4, (), ())


def resnext(groups: int, width: int, blocks: int = 2, prefix: str = "") -> dict[str, torch.Tensor]:
    """Convolutions of a ResNeXt, torchvision's names: ``groups`` in each block's conv2."""
    state, entering = {f"{prefix}conv1.weight": torch.randn(64, 3, 7, 7)}, 64
    for stage in range(1, 5):
        inner, out = width * 2 ** (stage - 1), 128 * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"{prefix}layer{stage}.{block}"
            state[f"{name}.conv1.weight"] = torch.randn(inner, entering, 1, 1)
            state[f"{name}.conv2.weight"] = torch.randn(inner, inner // groups, 3, 3)
            state[f"{name}.conv3.weight"] = torch.randn(out, inner, 1, 1)
            if block == 0:
                state[f"{name}.downsample.0.weight"] = torch.randn(out, entering, 1, 1)
            entering = out
    return state | {f"{prefix}fc.weight": torch.randn(1000, entering)}


@pytest.mark.parametrize(
    ("groups", "width", "prefix"),
    [
        (32, 128, ""),  # 32x4d: layer4's conv2 sees 32 channels of 1024, more than the limit
        (2, 64, "backbone."),  # two groups: every conv2 from layer1 on sees 32 or more
        (64, 64, ""),  # as many groups as channels in layer1, which is depthwise
    ],
    ids=["ResNeXt 32x4d", "two groups, prefixed", "depthwise"],
)
def test_grouped_convolutions_get_no_spectrum(groups: int, width: int, prefix: str) -> None:
    state = resnext(groups, width, prefix=prefix)
    made = convert_state_dict(state)
    report = describe_conversion(state, made, FDConvConfig())
    conv2 = {f"{prefix}layer{s}.{b}.conv2" for s in range(1, 5) for b in range(2)}
    assert set(report.grouped) == conv2
    assert set(report.converted) == {
        f"{prefix}layer{s}.{b}.conv{n}" for s in range(1, 5) for b in range(2) for n in (1, 3)
    }
    assert (report.left_random, report.unrecognised) == ((), ())
    for name in conv2:
        assert made[f"{name}.weight"] is state[f"{name}.weight"]
    lower = convert_state_dict(state, use_fdconv_if_c_gt=0)
    assert not conv2 & {key.removesuffix(".dft_weight") for key in lower if "dft" in key}


def test_one_group_is_not_taken_for_several() -> None:
    state = resnext(1, 64)
    report = describe_conversion(state, convert_state_dict(state), FDConvConfig())
    assert (len(report.converted), report.grouped) == (24, ())


def test_names_that_are_not_known_are_listed() -> None:
    """A ResNet whose second convolutions are other modules, as Res2Net's and ResNeSt's are."""
    state = resnext(1, 64, blocks=1)
    for stage in (1, 2):
        moved = state.pop(f"layer{stage}.0.conv2.weight")
        state[f"layer{stage}.0.convs.0.weight"] = moved
    state["conv1.3.weight"] = torch.randn(32, 32, 3, 3)  # timm's deep stem
    state["blocks.0.mlp.fc1.weight"] = torch.randn(96, 48)  # a transformer's, of timm
    state["blocks.0.attn.qkv.weight"] = torch.randn(144, 48)  # stays plain in any case
    state["layer1.0.se.fc1.weight"] = torch.randn(16, 64, 1, 1)  # too small for FDConv
    report = describe_conversion(state, convert_state_dict(state), FDConvConfig())
    assert report.unrecognised == (
        "layer1.0.convs.0",
        "layer2.0.convs.0",
        "conv1.3",
        "blocks.0.mlp.fc1",
    )
    assert len(report.converted) == 10
