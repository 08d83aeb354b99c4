"""Backbones, heads and whole segmentors against the published code's tensors and key lists."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fdconv_deploy.config import (
    FCNHeadConfig,
    FDConvConfig,
    ResNetConfig,
    SegmentorConfig,
    UPerHeadConfig,
)
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn import FDConv2d, FDLinear, ResNet, Segmentor

KN64 = FDConvConfig(kernel_num=64)


def keys_of(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + k: tuple(v.shape) for k, v in module.state_dict().items()}


def listed(path) -> dict[str, tuple[int, ...]]:
    return {e["key"]: tuple(e["shape"]) for e in json.loads(path.read_text())["keys"]}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("resnet18_fdconv_kn64", ResNetConfig(depth=18, conv=KN64)),
        ("resnet18_plain", ResNetConfig(depth=18, conv=None)),
        ("resnet50_fdconv_kn64", ResNetConfig(depth=50, conv=KN64)),
        ("resnet50_plain", ResNetConfig(depth=50, conv=None)),
    ],
)
def test_backbone_keys(oracle, name, config):
    assert keys_of(ResNet(config)) == listed(oracle / f"backbone/{name}_keys.json")


def upernet(backbone: ResNetConfig) -> SegmentorConfig:
    return SegmentorConfig(
        backbone=backbone,
        decode_head=UPerHeadConfig(
            in_channels=(256, 512, 1024, 2048),
            in_index=(0, 1, 2, 3),
            channels=512,
            num_classes=150,
        ),
        auxiliary_head=FCNHeadConfig(
            in_channels=(1024,),
            in_index=(2,),
            channels=256,
            num_classes=150,
            num_convs=1,
            concat_input=False,
        ),
    )


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("upernet_r50_fdconv_kn64_c150", ResNetConfig(conv=KN64)),
        ("upernet_r50_plain_c150", ResNetConfig(conv=None)),
        ("upernet_r50_plain_deepstem_c150", ResNetConfig(conv=None, deep_stem=True)),
        (
            "upernet_r50_fdconv_deepstem_kn32_c150",
            ResNetConfig(conv=FDConvConfig(kernel_num=32), deep_stem=True),
        ),
        (
            "upernet_r50_fdconv_deepstem_kn64_cgt32_c150",
            ResNetConfig(conv=FDConvConfig(kernel_num=64, use_fdconv_if_c_gt=32), deep_stem=True),
        ),
    ],
)
def test_segmentor_keys(oracle, name, backbone):
    assert keys_of(Segmentor(upernet(backbone))) == listed(oracle / f"segmentor/{name}_keys.json")


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_detector_backbone_keys(oracle, kind):
    name = f"mmdet/{kind}_r50_fpn_fdconv_kn64_c80_keys_mmdet2.28.1.json"
    theirs = {k: v for k, v in listed(oracle / name).items() if k.startswith("backbone.")}
    assert keys_of(ResNet(ResNetConfig(conv=KN64)), "backbone.") == theirs


VARIANTS = {
    "": {},
    "caffe.": {"style": "caffe"},
    "dilated.": {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_backbone_equals_published_code(oracle, variant):
    tensors = load_file(oracle / "backbone/r50_base12_kn8.safetensors")
    info = json.loads((oracle / "backbone/index.json").read_text())[0]
    config = ResNetConfig(
        depth=50, base_channels=12, conv=FDConvConfig(kernel_num=8), **VARIANTS[variant]
    )
    network = ResNet(config).eval()
    network.load_state_dict(
        {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    )
    outputs = network(tensors["x"])
    # Stage by stage, each fed the published code's own previous output: the fixture's random
    # weights amplify float32 noise so much with depth (in the caffe variant until nothing is
    # left of the answer) that only this compares the arithmetic and not the noise.
    for index in range(1, 4):
        previous, expected = tensors[f"{variant}out{index - 1}"], tensors[f"{variant}out{index}"]
        stage = network.stages[index]
        single = stage(previous)
        double = stage.double()(previous.double())
        stage.float()
        noise = (single - double).abs().max() / expected.abs().max()
        error = (single - expected).abs().max() / expected.abs().max()
        assert noise < 1e-3
        assert error <= max(1e-5, float(noise)), f"stage {index}: {error:.2e}"
    if variant != "caffe.":
        # End to end within twice what the published code itself moves by when only its
        # convolution library changes.
        floors = info["rel_noise_floor_mkldnn_off"]
        for index, (ours, floor) in enumerate(zip(outputs, floors, strict=True)):
            expected = tensors[f"{variant}out{index}"]
            error = (ours - expected).abs().max() / expected.abs().max()
            assert error <= max(1e-5, 2 * floor), f"output {index}: {error:.2e}"
    layers = [n for n, m in network.named_modules() if isinstance(m, FDConv2d) and m.is_dynamic]
    assert layers == info["fdconv_layers"]


@pytest.mark.parametrize("name", ["bnc_default", "softmax", "noconvert"])
@torch.no_grad()
def test_linear_equals_published_code(oracle, name):
    index = json.loads((oracle / "fdlinear/index.json").read_text())["cases"]
    case = next(c for c in index if c["file"] == f"{name}.safetensors")
    tensors = load_file(oracle / "fdlinear" / case["file"])
    layer = FDLinear(**case["ctor"]).eval()
    layer.load_state_dict(
        {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    )
    torch.testing.assert_close(
        layer(tensors["x"]), tensors["y"], rtol=0, atol=1e-5 * case["absmax"]
    )
    weights = layer.kernels(layer.KSM_Global(tensors["x"].mean(1)), None, full=True)[..., 0, 0]
    torch.testing.assert_close(weights, tensors["mid.dynamic_weight"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_linear_takes_odd_features_and_rows():
    torch.manual_seed(0)
    layer = FDLinear(33, 20, kernel_num=2).eval()
    rows = torch.randn(5, 33)
    assert layer(rows).shape == (5, 20)
    torch.testing.assert_close(layer(rows), layer(rows[:, None])[:, 0])


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        (ResNetConfig(depth=20), "18"),
        (ResNetConfig(conv=KN64, deep_stem=True), "use_fdconv_if_c_gt"),
        (ResNetConfig(conv=KN64, base_channels=32), "does not divide"),
        (ResNetConfig(strides=(1, 2)), "one entry"),
        (ResNetConfig(num_stages=3), "out_indices"),
    ],
)
def test_networks_that_cannot_be_built_say_so(config, hint):
    with pytest.raises(UnsupportedLayerError, match=hint):
        ResNet(config)


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize(
    "options",
    [
        {"deep_stem": True, "avg_down": True},
        {"contract_dilation": True, "dilations": (1, 1, 2, 4), "strides": (1, 2, 1, 1)},
        {"style": "caffe", "out_indices": (1, 3)},
    ],
)
@torch.no_grad()
def test_resnet_variants_run(depth, options):
    config = ResNetConfig(depth=depth, base_channels=8, conv=FDConvConfig(kernel_num=4), **options)
    outputs = ResNet(config).eval()(torch.randn(1, 3, 33, 47))
    assert len(outputs) == len(config.out_indices)
    if "dilations" in options:
        assert outputs[1].shape[-2:] == outputs[3].shape[-2:]
