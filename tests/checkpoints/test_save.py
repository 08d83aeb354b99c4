"""A saved network is read back as the same network; a file appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fdconv_deploy.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from fdconv_deploy.checkpoints.config_parser import parse_config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.config import (
    BoxHeadConfig,
    DetectorConfig,
    FDConvConfig,
    FPNConfig,
    MaskHeadConfig,
    ResNetConfig,
    RPNHeadConfig,
    SegmentorConfig,
)
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.detection import Detector
from tests.checkpoints.small import CLASSES, small_architecture, weights_of


def test_round_trip_of_weights_and_architecture(tmp_path: Path) -> None:
    architecture = small_architecture(auxiliary=True)
    weights = weights_of(architecture)
    path = tmp_path / "a.pth"
    save_checkpoint(path, weights, architecture)
    found = read_checkpoint(path)
    assert found.format == "mmengine published"
    assert found.state_dict.keys() == weights.keys()
    assert all(torch.equal(found.state_dict[key], value) for key, value in weights.items())
    assert load_checkpoint(path, auxiliary=True).architecture == architecture
    plain = torch.load(path, weights_only=True)  # noqa: TID251 - what anyone else would do
    assert plain["meta"]["dataset_meta"]["classes"] == CLASSES


def test_network_itself_and_own_config(tmp_path: Path) -> None:
    architecture = small_architecture()
    network = Segmentor(architecture)
    path = tmp_path / "a.pth"
    save_checkpoint(path, network, architecture, config_text="model = dict(type='EncoderDecoder')")
    assert read_checkpoint(path).meta["cfg"] == "model = dict(type='EncoderDecoder')"
    assert load_checkpoint(path).architecture.backbone == architecture.backbone


def test_views_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    architecture = small_architecture()
    weights = weights_of(architecture)
    total = sum(v.nbytes for v in weights.values())
    big = torch.zeros(1 << 24)
    weights["backbone.bn1.weight"] = big[:8]
    path = tmp_path / "a.pth"
    save_checkpoint(path, weights, architecture)
    assert path.stat().st_size < 2 * total + (1 << 20)


def test_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = small_architecture()
    path = tmp_path / "a.pth"
    save_checkpoint(path, weights_of(architecture), architecture)
    before = path.read_bytes()

    def fails(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        save_checkpoint(path, weights_of(architecture, seed=1), architecture)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    architecture = small_architecture()
    save_checkpoint(tmp_path / "new" / "one" / "a.pth", weights_of(architecture), architecture)
    assert load_checkpoint(tmp_path / "new" / "one" / "a.pth").architecture == architecture


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    architecture = small_architecture()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="folder that you may write to"):
        save_checkpoint(tmp_path / "file" / "a.pth", weights_of(architecture), architecture)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        (small_architecture(auxiliary=True), "no auxiliary head and the architecture one"),
        (
            small_architecture().model_copy(
                update={
                    "decode_head": small_architecture().decode_head.model_copy(
                        update={"num_classes": 19}
                    )
                }
            ),
            "have 3 classes .* the architecture 19",
        ),
    ],
)
def test_weights_of_another_network(
    tmp_path: Path, architecture: SegmentorConfig, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        save_checkpoint(tmp_path / "a.pth", weights_of(small_architecture()), architecture)
    with pytest.raises(CheckpointError, match="expected a segmentor's state dict"):
        save_checkpoint(tmp_path / "a.pth", {"fc.weight": torch.ones(1)}, architecture)


def small_detector(classes: int = 3, *, masks: bool = True) -> DetectorConfig:
    backbone = ResNetConfig(depth=18, base_channels=8, conv=None)
    return DetectorConfig(
        backbone=backbone,
        neck=FPNConfig(in_channels=(8, 16, 32, 64), out_channels=8),
        rpn_head=RPNHeadConfig(feat_channels=8),
        bbox_head=BoxHeadConfig(num_classes=classes, fc_out_channels=8),
        mask_head=MaskHeadConfig(num_classes=classes, conv_out_channels=8) if masks else None,
        classes=tuple("abcdefgh"[:classes]),
        palette=tuple((n, 0, 0) for n in range(classes)),
    )


def test_a_detector_as_mmdetection_saves_one(tmp_path: Path) -> None:
    architecture = small_detector()
    network = Detector(architecture)
    save_checkpoint(tmp_path / "a.pth", network, architecture)
    found = read_checkpoint(tmp_path / "a.pth")
    assert found.state_dict.keys() == network.state_dict().keys()
    assert tuple(found.meta["CLASSES"]) == architecture.classes
    assert found.meta["PALETTE"] == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert found.meta["config"] == format_config(architecture)


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        (small_detector(masks=False), "a mask head and the architecture none"),
        (small_detector(4), "have 3 classes .* the architecture 4"),
        (small_architecture(), "expected a segmentor's state dict"),
    ],
)
def test_weights_of_another_detector(tmp_path: Path, architecture: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        save_checkpoint(tmp_path / "a.pth", Detector(small_detector()), architecture)


def test_the_published_detector_gets_the_published_config(oracle: Path) -> None:
    """What both configs state is the same; what ours leaves out concerns training alone."""
    name = "mask_rcnn_r50_fpn_fdconv_kn64_c80_keys_mmdet2.28.1.json"
    told = json.loads((oracle / "mmdet" / name).read_text())
    architecture = DetectorConfig(
        backbone=ResNetConfig(conv=FDConvConfig(kernel_num=64)), mask_head=MaskHeadConfig()
    )
    config = parse_config(format_config(architecture))
    assert not config.notes
    missing: list[str] = []

    def compare(published: Any, ours: Any, where: str) -> None:
        if isinstance(published, dict) and isinstance(ours, dict):
            missing.extend(f"{where}.{key}" for key in published.keys() - ours.keys())
            for key in published.keys() & ours.keys():
                compare(published[key], ours[key], f"{where}.{key}")
        else:
            plain = [list(v) if isinstance(v, tuple) else v for v in (published, ours)]
            assert plain[0] == plain[1], where

    compare(told["cfg_model"], config.section("model"), "model")
    training = ("train_cfg", "loss_", "init", "frozen", "norm_eval", "need_grad", "pretrained")
    # What the published FDConv ignores, and a head's test settings, which stand in test_cfg.
    unused = ("spatial_freq_decompose", "fs_feat", ".spatial", "roi_head.test_cfg")
    assert [name for name in missing if not any(word in name for word in training + unused)] == []
