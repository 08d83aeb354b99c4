"""Sharded checkpoints are read by their index, distributed ones are named as what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fdconv_deploy.checkpoints import read_checkpoint
from fdconv_deploy.errors import CheckpointError

FILES = Path(__file__).parents[1] / "real_packages"


NAMES = {"backbone.0.weight", "backbone.1.running_mean", "decode_head.conv_seg.bias"}


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
