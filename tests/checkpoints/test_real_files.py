"""Files that the real packages wrote (tests/real_packages) are read, without these packages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fdconv_deploy.checkpoints import inspect_checkpoint, load_checkpoint, read_checkpoint
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import saved

FILES = Path(__file__).parents[1] / "real_packages"
NAMES = {"backbone.0.weight", "backbone.1.running_mean", "decode_head.conv_seg.bias"}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("train", "mmengine training"),
        ("train_ema", "mmengine training"),
        ("published", "mmengine published"),
    ],
)
def test_mmengine_runner_and_publish_tool(name: str, layout: str) -> None:
    found = read_checkpoint(FILES / f"mmengine/files/{name}.pth")
    assert found.format == layout
    assert set(found.state_dict) >= NAMES
    assert "message_hub" in found.dropped
    assert found.meta["dataset_meta"]["classes"] == ("road", "sky")
    assert "ResNet_FDConv" in found.meta["cfg"]
    if name == "train_ema":
        assert found.other_weights == ("ema_state_dict",)
        trained = read_checkpoint(found.path, weights="ema_state_dict").state_dict
        assert trained.keys() == found.state_dict.keys()
        assert not torch.equal(trained["backbone.0.weight"], found.state_dict["backbone.0.weight"])


@pytest.mark.parametrize(
    ("name", "others"),
    [("model", ()), ("compiled", ()), ("averaged", ("current_model_state",))],
)
def test_lightning_with_hyper_parameters_of_omegaconf(name: str, others: tuple[str, ...]) -> None:
    found = read_checkpoint(FILES / f"lightning/files/{name}.ckpt")
    assert found.format == "Lightning"
    assert set(found.state_dict) >= NAMES
    assert not any("criterion" in key or "loss" in key for key in found.state_dict)
    assert {"criterion.pos_weight", "train_loss.… (2 entries)"} <= set(found.dropped)
    assert found.other_weights == others


def test_detectron2_checkpoints_and_pickles_of_arrays_are_the_same_weights() -> None:
    folder = FILES / "fvcore/files"
    expected = read_checkpoint(folder / "model.pth")
    assert expected.format == "detectron2"
    for protocol in (2, 4, 5):
        found = read_checkpoint(folder / f"model_{protocol}.pkl")
        assert found.format == "detectron2"
        assert set(found.state_dict) == set(expected.state_dict)
        for name, value in found.state_dict.items():
            assert value.dtype == expected.state_dict[name].dtype
            assert torch.equal(value, expected.state_dict[name])


def test_distributed_files_are_named_as_what_they_are() -> None:
    folder = FILES / "torch_distributed/files"
    with pytest.raises(CheckpointError, match=r"DTensor.*full_state_dict=True"):
        read_checkpoint(folder / "fsdp2.pth")
    for name in ("dcp", "dcp/__0_0.distcp", "dcp/.metadata"):
        with pytest.raises(CheckpointError, match=r"distributed checkpoint.*dcp_to_torch"):
            read_checkpoint(folder / name)
    assert set(read_checkpoint(folder / "wrapped.pth").state_dict) >= NAMES


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_checkpoint_in_several_files(tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(FILES / "huggingface_hub/files" / kind, tmp_path / kind)
    index = next(folder.glob("*.index.json"))
    whole = read_checkpoint(folder).state_dict
    assert set(whole) >= NAMES
    assert set(read_checkpoint(index).state_dict) == set(whole)
    shard = sorted(folder.glob("*-of-*"))[0]
    with pytest.raises(CheckpointError, match=r"one of 2 files.*index\.json"):
        read_checkpoint(shard)
    content = json.loads(index.read_text())
    for name in ("../../secret", "/etc/passwd", 3, "", "a" * 300, "a\0b", "."):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="name of a file beside it"):
            read_checkpoint(index)
    content["weight_map"]["backbone.9.weight"] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"backbone\.9\.weight.*not there"):
        read_checkpoint(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"names the file .*Download all"):
        read_checkpoint(folder)
    for damage in ("", "{", "[]", '{"weight_map": []}'):
        index.write_text(damage)
        with pytest.raises(CheckpointError, match="index"):
            read_checkpoint(folder)


def test_numpy_archives_are_named_as_what_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"backbone.conv1.weight": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"\.npz.*from_numpy"):
        read_checkpoint(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(CheckpointError, match="one NumPy array"):
        read_checkpoint(tmp_path / "a.npy")


def test_fsdp_flat_parameters_are_named_as_what_they_are(tmp_path: Path) -> None:
    state = {"backbone._flat_param": torch.ones(8), "backbone.a.b": torch.ones(1)}
    with pytest.raises(CheckpointError, match="FULL_STATE_DICT"):
        read_checkpoint(saved(tmp_path / "a.pth", state))


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("segformer_mit", "MixVisionTransformer"),
        ("upernet_swin", "SwinTransformer"),
        ("mask_rcnn_convnext", "ConvNeXt"),
        ("mask2former_r50", "Mask2Former"),
    ],
)
def test_networks_not_supported_are_named(oracle: Path, family: str, says: str) -> None:
    path = oracle / "families" / family / "fdconv_train.pth"
    found = read_checkpoint(path)
    assert found.format == "mmengine training"
    assert found.meta["mmengine_version"] == "0.10.7"
    assert says in (inspect_checkpoint(path).problem or "")
    with pytest.raises(CheckpointError, match=rf"{says}.*not supported"):
        load_checkpoint(path)
