"""`fdconv convert`: files in, files out, nothing half done."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fdconv_deploy.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    load_detector,
    parse_config,
    read_checkpoint,
    save_checkpoint,
)
from fdconv_deploy.cli import app as cli
from fdconv_deploy.config import FDConvConfig
from fdconv_deploy.demo import plain_checkpoint
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn.detection import build_detector
from tests.checkpoints.test_convert import NAMES, plain_resnet, resnext
from tests.checkpoints.test_infer_detector import small
from tests.reference.lively import error


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
    save_checkpoint(tmp_path / "in.pth", build_detector(plain), plain)
    convert_checkpoint(
        tmp_path / "in.pth", tmp_path / "out.pth", equivalent=True, arguments={"kernel_num": 6}
    )
    network = load_detector(tmp_path / "out.pth")
    conv = FDConvConfig(kernel_num=6)
    assert network.architecture.backbone.conv == conv
    assert network.architecture.test == plain.test
    assert network.architecture.classes == plain.classes
    before = load_detector(tmp_path / "in.pth", require_fdconv=False)
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


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    torch.save(plain_resnet(18, num_stages=2, out_indices=(0, 1)).state_dict(), tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "no" / "out.pth")
