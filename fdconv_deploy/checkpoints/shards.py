"""Sharded checkpoints: read by their index, or named as what they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fdconv_deploy.checkpoints.config_parser import printable
from fdconv_deploy.errors import CheckpointError

_INDEX = re.compile(r"\.(safetensors|bin|pth|pt)\.index\.json$")
_SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})\.(safetensors|bin|pth|pt)$")
_NAME = re.compile(r"[^\\/\0]{1,200}")
MAX_INDEX_BYTES = 64 << 20


def find_index(path: Path) -> Path | None:
    """The index of a sharded checkpoint, if ``path`` is one or its folder.

    Raises:
        CheckpointError: it is of torch's distributed checkpoints or of DeepSpeed, which have to
            be gathered first, or the folder has several indices.
    """
    if not path.is_dir():
        if path.suffix == ".distcp" or path.name == ".metadata":
            raise _distributed(path, path.parent)
        return path if _INDEX.search(path.name) and path.is_file() else None
    if (path / ".metadata").is_file() or any(path.glob("*.distcp")):
        raise _distributed(path, path)
    if (path / "latest").is_file() or (path / "zero_to_fp32.py").is_file():
        raise CheckpointError(
            f"{path} is a folder of DeepSpeed. Expected a file: give the "
            "mp_rank_00_model_states.pt in it; of stage 3, gather it first with the "
            "zero_to_fp32.py that lies there."
        )
    found = sorted(file for file in path.iterdir() if _INDEX.search(file.name))
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds several checkpoints: {', '.join(file.name for file in found[:5])}. "
            "Give one of these files."
        )
    return found[0] if found else None


def _distributed(path: Path, folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is of a distributed checkpoint of PyTorch (.metadata and .distcp files). "
        "Expected one file. Gather it first: python -m torch.distributed.checkpoint.format_utils "
        f"dcp_to_torch {folder} gathered.pth"
    )


def refuse_one_shard(path: Path) -> None:
    """Refuse a file that is one of several.

    Raises:
        CheckpointError: its name says that it is.
    """
    found = _SHARD.search(path.name)
    if found and int(found[2]) > 1:
        raise CheckpointError(
            f"{path} is one of {int(found[2])} files that hold one network. Give their folder, or "
            "the ….index.json in it, and keep all of them there."
        )


def digest_of(path: Path) -> str:
    """The sha256 of a checkpoint: of its file, or of its index and all files that it names."""
    index = find_index(path)
    if index is None:
        return _sha256(path)
    files = [index, *(index.parent / name for name in sorted(set(_weight_map(index).values())))]
    return hashlib.sha256("".join(map(_sha256, files)).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_shards(
    index: Path, read: Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All tensors that an index names, in its order, and the metadata of the files.

    Args:
        index: a JSON object with a ``weight_map``: names of tensors → names of files beside it.
        read: gives the tensors and metadata of one file.

    Raises:
        CheckpointError: the index or a file is damaged, a file is missing, or a tensor is not
            where the index says.
    """
    places = _weight_map(index)
    tensors: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    for name in dict.fromkeys(places.values()):
        file = index.parent / name
        if not file.is_file():
            raise CheckpointError(
                f"{index} names the file {name}, which is not there. Download all files of the "
                "checkpoint into one folder."
            )
        found, strings = read(file)
        meta |= strings
        tensors |= {key: value for key, value in found.items() if places.get(key) == name}
    missing = [key for key in places if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{index} names {missing[0]} in {places[missing[0]]}, and it is not there"
            f"{f' ({len(missing)} such tensors)' if len(missing) > 1 else ''}. The files are not "
            "of one checkpoint; download all of them again."
        )
    return {key: tensors[key] for key in places}, meta


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("it is too large")
        content = printable(json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{index} cannot be read as the index of a checkpoint: {error}. Download it again."
        ) from None
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"{index} has no weight_map (names of tensors → names of files). Expected the index of "
            "a checkpoint in several files; download it again."
        )
    for key, name in places.items():
        # A name with a folder in it could reach any file of this machine.
        if not isinstance(name, str) or Path(name).name != name or not _NAME.fullmatch(name):
            raise CheckpointError(
                f"{index} places {key} in {str(name)[:80]!r}. Expected the name of a file beside "
                "it. Download it again."
            )
    return places
