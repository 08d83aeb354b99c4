"""Plain weights and files → FDConv weights and files, as the published converter writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fdconv_deploy.checkpoints import (
    convert_checkpoint,
    convert_state_dict,
    inspect_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from fdconv_deploy.checkpoints.config_parser import parse_config
from fdconv_deploy.checkpoints.convert import Conversion, describe_conversion, equivalent_state_dict
from fdconv_deploy.cli import app as cli
from fdconv_deploy.config import FDConvConfig, ResNetConfig
from fdconv_deploy.demo import plain_checkpoint
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError
from fdconv_deploy.nn import FDConv2d, ResNet
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.fdconv import dynamic_layers
from tests.checkpoints.test_detectors import small
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
    network = ResNet(ResNetConfig(depth=depth, base_channels=18, conv=None, **fields)).eval()
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


def convert(monkeypatch: Any, capfd: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fdconv", "convert", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capfd.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mit_mmseg"])
def test_files_of_the_published_converter(
    oracle: Path, tmp_path: Path, name: str, monkeypatch: Any, capfd: Any
) -> None:
    source = oracle / "convert" / f"{name}_in.pth"
    code, out, _ = convert(monkeypatch, capfd, source, "-o", tmp_path / "out.pth")
    assert code == 0
    found = read_checkpoint(tmp_path / "out.pth").state_dict
    expected = read_checkpoint(oracle / "convert" / f"{name}_out.pth").state_dict
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
    assert ("starts them from random weights" in out) == (name == "resnet_torchvision_style")
    assert "Next: train an FDConv network" in out
    assert [p.name for p in tmp_path.iterdir()] == ["out.pth"]


def test_where_nothing_is_converted_nothing_is_written(
    oracle: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    source = oracle / "convert" / "mit_mmseg_in.pth"
    code, _, err = convert(monkeypatch, capfd, source, "-o", tmp_path / "out.pth")
    assert code == 1
    assert "6 layers of a size that FDConv replaces have names" in err
    assert not list(tmp_path.iterdir())


def test_what_stays_plain_is_counted_and_listed(
    tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # a long path breaks no line
    state = resnext(32, 128, blocks=1) | {"layer1.0.convs.0.weight": torch.ones(64, 64, 3, 3)}
    torch.save(state, tmp_path / "in.pth")
    code, out, _ = convert(monkeypatch, capfd, tmp_path / "in.pth", "-o", tmp_path / "out.pth")
    assert code == 0
    assert "out.pth: 8 layers have their spectrum now" in out
    assert "4 layers are grouped convolutions" in out
    assert "layer1.0.conv2, layer2.0.conv2, layer3.0.conv2, layer4.0.conv2" in out
    assert "1 layers were not recognised" in out
    assert "layer1.0.convs.0" in out
    kept = read_checkpoint(tmp_path / "out.pth").state_dict
    assert kept["layer4.0.conv2.weight"].shape == (1024, 32, 3, 3)


@torch.no_grad()
def test_an_equivalent_segmentor(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """The packaged plain twin as an FDConv network: the same answers, told by its own file."""
    out = tmp_path / "equivalent.safetensors"
    code, said, _ = convert(
        monkeypatch, capfd, plain_checkpoint(), "-o", out, "--equivalent",
        "--kernel-num", 16, "--set", "att_multi=1.5", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(said)
    assert len(report["converted"]) == 30
    assert report["method"] == "equivalent"
    plain = load_checkpoint(plain_checkpoint(), require_fdconv=False)
    network = load_checkpoint(out)
    conv = network.architecture.backbone.conv
    assert conv is not None
    assert (conv.kernel_num, conv.att_multi) == (16, 1.5)
    x = torch.randn(1, 3, 96, 128)
    assert error(network(x), plain(x)) <= 1e-4


@torch.no_grad()
def test_an_equivalent_detector(tmp_path: Path) -> None:
    """Told by its own config, as before: only its backbone's layers are others."""
    fdconv = small()
    plain = fdconv.model_copy(
        update={"backbone": fdconv.backbone.model_copy(update={"conv": None})}
    )
    save_checkpoint(tmp_path / "in.pth", Detector(plain), plain)
    convert_checkpoint(
        tmp_path / "in.pth", tmp_path / "out.pth", equivalent=True, arguments={"kernel_num": 6}
    )
    network = load_checkpoint(tmp_path / "out.pth")
    conv = FDConvConfig(kernel_num=6)
    assert network.architecture.backbone.conv == conv
    assert network.architecture.test == plain.test
    assert network.architecture.classes == plain.classes
    before = load_checkpoint(tmp_path / "in.pth", require_fdconv=False)
    x = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(network.backbone(x), before.backbone(x), strict=True):
        assert error(ours, theirs) <= 1e-5


def test_an_imagenet_classifier(tmp_path: Path) -> None:
    """torchvision's names; the file tells its config, and inspect understands it."""
    plain = plain_resnet(18, num_stages=2, out_indices=(0, 1))
    plain.fc = torch.nn.Linear(36, 10)
    torch.save({"state_dict": plain.state_dict(), "meta": {"epoch": 90}}, tmp_path / "in.pth")
    convert_checkpoint(
        tmp_path / "in.pth",
        tmp_path / "out.pth",
        equivalent=True,
        arguments={"kernel_num": 6, "param_ratio": 2},
    )
    made = read_checkpoint(tmp_path / "out.pth")
    assert (made.meta["epoch"], made.meta["conversion"]) == (90, "equivalent")
    assert made.meta["converted_from"] == "in.pth"
    section = parse_config(made.meta["cfg"]).section("model", "backbone")
    assert section["conv_cfg"]["kernel_num"] == 6
    report = inspect_checkpoint(tmp_path / "out.pth")
    assert report.problem is None
    assert report.dynamic_layers == 8
    assert report.backbone is not None
    assert report.backbone.conv is not None
    assert report.backbone.conv.param_ratio == 2


def test_a_start_is_no_network_yet(tmp_path: Path) -> None:
    """What the published converter writes is told apart, by inspect and on loading."""
    convert_checkpoint(plain_checkpoint(), tmp_path / "start.pth")
    report = inspect_checkpoint(tmp_path / "start.pth")
    assert report.problem is not None
    assert "spectra without attentions (layer" in report.problem
    with pytest.raises(CheckpointError, match="--equivalent for a whole network"):
        load_checkpoint(tmp_path / "start.pth", require_fdconv=False)


def test_the_limit_is_given(tmp_path: Path) -> None:
    torch.save(plain_resnet(18, num_stages=2, out_indices=(0, 1)).state_dict(), tmp_path / "in.pth")
    report = convert_checkpoint(tmp_path / "in.pth", tmp_path / "a.pth")
    assert len(report.converted) == 3  # 36 channels; 18 to 36 is not above 31
    assert len(report.left_random) == 5
    report = convert_checkpoint(
        tmp_path / "in.pth", tmp_path / "b.pth", arguments={"use_fdconv_if_c_gt": 16}
    )
    assert (len(report.converted), report.left_random) == (8, ())


def test_a_file_that_is_there_stays(oracle: Path, tmp_path: Path) -> None:
    source, out = oracle / "convert" / f"{NAMES[0]}_in.pth", tmp_path / "out.pth"
    out.write_bytes(b"dear")
    with pytest.raises(CheckpointError, match="replace it with overwrite=True"):
        convert_checkpoint(source, out)
    assert out.read_bytes() == b"dear"
    convert_checkpoint(source, out, overwrite=True)
    assert read_checkpoint(out).state_dict


@pytest.mark.parametrize(
    ("state", "options", "hint"),
    [
        ({"stages.0.blocks.0.conv.weight": torch.ones(64, 64, 3, 3)}, {}, "1 layers of a size"),
        ({"layer1.0.conv1.weight": torch.ones(8, 8, 3, 3)}, {}, "Nothing in it is to be"),
        ({"a.dft_weight": torch.ones(1)}, {}, "FDConv network already"),
        ({"layers.0.ffn.layers.1.weight": torch.ones(64, 64)}, {"equivalent": True}, "a ResNet"),
        ({"a": torch.ones(1)}, {"arguments": {"kernel_nums": 4}}, "kernel_nums.*kernel_num"),
    ],
    ids=["another network", "small layers", "FDConv already", "a ViT", "unknown argument"],
)
def test_refusals(tmp_path: Path, state: Any, options: Any, hint: str) -> None:
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=hint):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["in.pth"]


@pytest.mark.parametrize("equivalent", [False, True])
def test_groups_that_do_not_divide_name_the_layer(tmp_path: Path, equivalent: bool) -> None:
    """1×1 of 72 and 18 channels: 72 × 10 and 18 × 37 bins; of 3×3, 54 × 28."""
    torch.save(plain_resnet(50, num_stages=1, out_indices=(0,)).state_dict(), tmp_path / "in.pth")
    with pytest.raises(
        UnsupportedLayerError,
        match=r"kernel_num=64 does not divide the \d+ frequency bins of layer1\.0\.conv\d, nor "
        r"those of \d+ other layers.* next lower is (\d+)\)",
    ) as caught:
        convert_checkpoint(
            tmp_path / "in.pth", tmp_path / "out.pth", equivalent=equivalent,
            arguments={"kernel_num": 64},
        )  # fmt: skip
    assert not (tmp_path / "out.pth").exists()
    lower = int(str(caught.value).partition("lower is ")[2].partition(")")[0])
    convert_checkpoint(
        tmp_path / "in.pth", tmp_path / "out.pth", equivalent=True, arguments={"kernel_num": lower}
    )


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    torch.save(plain_resnet(18, num_stages=2, out_indices=(0, 1)).state_dict(), tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "in.pth" / "out.pth")


FAMILIES = ("segformer_mit", "upernet_swin", "upernet_convnext", "mask_rcnn_convnext")


def plain_file(oracle: Path, family: str) -> Path:
    (path,) = (oracle / "families" / family).glob("plain_published-*.pth")
    return path


@pytest.mark.parametrize("family", [*FAMILIES, "mask2former_swin"])
def test_equivalent_network_of_another_family(oracle: Path, tmp_path: Path, family: str) -> None:
    """Both layers of every feed-forward network become FDConv; the network computes the same."""
    source, made = plain_file(oracle, family), tmp_path / "made.pth"
    report = convert_checkpoint(source, made, equivalent=True, arguments={"kernel_num": 4})
    network = load_checkpoint(made)
    dynamic = dynamic_layers(network)
    index = json.loads((oracle / f"families/{family}/fdconv_index.json").read_text())
    assert set(report.converted) == set(dynamic) == set(index["fdconv_layers"])
    tensors = load_file(oracle / f"families/{family}/plain_b.safetensors")
    with torch.no_grad():
        for found, level in zip(network.backbone(tensors["input"]), range(4), strict=True):
            expected = tensors[f"feat{level}"]
            assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    # What the published converter's patterns meet: Swin's, and heads' of a whole Mask2Former.
    beyond = set() if "swin" in family else set(report.converted)
    assert set(report.beyond_published) == beyond
    assert bool(report.left_in_heads) == family.startswith("mask2former")
    assert all(".ffn.layers." in name for name in report.left_in_heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_start_of_another_family_has_spectra(oracle: Path, tmp_path: Path, family: str) -> None:
    made = tmp_path / "made.pth"
    limit = {"use_fdconv_if_c_gt": 16}
    report = convert_checkpoint(plain_file(oracle, family), made, arguments=limit)
    index = json.loads((oracle / f"families/{family}/fdconv_index.json").read_text())
    assert set(report.converted) == set(index["fdconv_layers"])
    assert report.unrecognised == report.left_random == ()
    before = read_checkpoint(plain_file(oracle, family)).state_dict
    after = read_checkpoint(made).state_dict
    for name in report.converted:
        weight = before[f"{name}.weight"]
        out, into = weight.shape[:2]
        assert after[f"{name}.dft_weight"].shape == (1, out, into // 2 + 1, 2)
        spectrum = torch.fft.rfft2(weight.reshape(out, into))
        found = torch.view_as_complex(after[f"{name}.dft_weight"][0].contiguous())
        # Up to the scale of the published layer.
        ratio = (found / spectrum).abs().median()
        assert float((found - spectrum * ratio).abs().max() / found.abs().max()) < 1e-4
        assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
    with pytest.raises(CheckpointError, match="spectra without attentions"):
        load_checkpoint(made)


def test_detectron2_names_are_not_converted(oracle: Path, tmp_path: Path) -> None:
    source = oracle / "query_heads/mask2former_r50/model_final.pth"
    with pytest.raises(CheckpointError, match="named as detectron2's"):
        convert_checkpoint(source, tmp_path / "a.pth", equivalent=True)
    assert not list(tmp_path.iterdir())
