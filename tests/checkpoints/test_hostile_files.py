"""Hostile and damaged files: nothing in them runs, and each gets a sentence."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fdconv_deploy.checkpoints import read_checkpoint
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import WEIGHTS, saved


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


class Opens:
    """Calls a builtin when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("attack", [Evil, Opens])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("force", [False, True])
def test_code_in_a_file_is_never_run(
    tmp_path: Path, attack: type, zipped: bool, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:  # torch's own switch to full unpickling must not reach here
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "touched"
    content = {"state_dict": WEIGHTS, "meta": {"x": attack(target)}}
    path = saved(tmp_path / "evil.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"names (posix\.system|open|\S*open), .*not weights"):
        read_checkpoint(path)
    assert not target.exists()


def test_raw_pickle_is_not_run_either(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil(target), protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not target.exists()


def test_stand_ins_do_nothing_with_hostile_state(tmp_path: Path) -> None:
    """A pickle may call the allowed names with anything; no array is built of it."""

    def opcodes(module: str, name: str, arguments: bytes) -> bytes:
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R"

    huge = b"K\x05J\xff\xff\xff\x7f\x86"  # (5, 2**31 - 1)
    for module, name in (
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy", "dtype"),
        ("argparse", "Namespace"),
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
    ):
        raw = b"\x80\x02}(X\x04\x00\x00\x00meta}X\x01\x00\x00\x00x" + opcodes(module, name, huge)
        raw += b"s" + b"u."
        buffer = io.BytesIO()
        torch.save(WEIGHTS, buffer)
        path = tmp_path / "a.pth"
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.infolist():
                is_pickle = entry.filename.endswith("data.pkl")
                target.writestr(entry.filename, raw if is_pickle else source.read(entry))
        with pytest.raises(CheckpointError, match="holds no weights"):
            read_checkpoint(path)


def test_truncated_files(tmp_path: Path) -> None:
    for zipped in (True, False):
        whole = saved(tmp_path / "a.pth", WEIGHTS, _use_new_zipfile_serialization=zipped)
        data = whole.read_bytes()
        for part in (0.2, 0.5, 0.9, 0.99):
            path = tmp_path / "cut.pth"
            path.write_bytes(data[: int(len(data) * part)])
            with pytest.raises(CheckpointError, match=r"[Dd]ownload"):
                read_checkpoint(path)
    whole = tmp_path / "a.safetensors"
    save_file(WEIGHTS, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="safetensors file but cannot be read"):
        read_checkpoint(tmp_path / "cut.safetensors")


def test_damaged_bytes_are_an_error_or_still_tensors(tmp_path: Path) -> None:
    data = saved(tmp_path / "a.pth", {"meta": {"cfg": "a=1"}, "state_dict": WEIGHTS}).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] = generator.integers(0, 256)
        path = tmp_path / "damaged.pth"
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            found = read_checkpoint(path)
            assert all(isinstance(v, torch.Tensor) for v in found.state_dict.values())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello world, I am a text", "is not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\x1f\x8b\x08\x00" * 4, "gzip"),
        (b"PK\x03\x04 but no zip", "cut short"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(path)


def test_folder_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    saved(tmp_path / "epoch_3.pth", WEIGHTS)
    with pytest.raises(CheckpointError, match=r"is a folder.*epoch_3\.pth"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch.ones(3), "holds a single tensor"),
        ([1, 2], "holds a list"),
        ({"epoch": 3, "lr": 0.1}, "holds no weights.*epoch, lr"),
        ({"state_dict": {}}, "empty state dict"),
        ({"state_dict": {"x": [1]}}, "empty state dict"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.empty(3, device="meta")}, "no data"),
        ({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, "claims"),
    ],
)
def test_not_a_state_dict(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(saved(tmp_path / "a.pth", content))


def test_compressed_zip_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.pth", {"a": torch.zeros(1 << 20)})
    path = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match="compressed entries"):
        read_checkpoint(path)


def test_torchscript_and_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"without PyTorch's data\.pkl"):
        read_checkpoint(path)


def test_allow_list_does_not_outlive_a_read(tmp_path: Path) -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    read_checkpoint(saved(tmp_path / "a.pth", WEIGHTS))
    assert set(map(str, torch.serialization.get_safe_globals())) == before
