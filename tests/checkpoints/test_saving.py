"""A saved network is read back as the same network; a file appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fdconv_deploy.architecture import Architecture
from fdconv_deploy.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn import build_segmentor
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
    network = build_segmentor(architecture)
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


def test_no_such_folder(tmp_path: Path) -> None:
    architecture = small_architecture()
    with pytest.raises(CheckpointError, match="folder that exists"):
        save_checkpoint(tmp_path / "none" / "a.pth", weights_of(architecture), architecture)


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
def test_weights_of_another_network(tmp_path: Path, architecture: Architecture, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        save_checkpoint(tmp_path / "a.pth", weights_of(small_architecture()), architecture)
    with pytest.raises(CheckpointError, match="expected a segmentor's state dict"):
        save_checkpoint(tmp_path / "a.pth", {"fc.weight": torch.ones(1)}, architecture)
