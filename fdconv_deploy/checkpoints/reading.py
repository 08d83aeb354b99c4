"""A checkpoint file → its state dict and what was written beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fdconv_deploy.checkpoints.choose_weights import behind_code, choose, tensors_of
from fdconv_deploy.checkpoints.file_formats import PickledFile, container_of, load_safetensors
from fdconv_deploy.checkpoints.safe_unpickling import (
    Made,
    TensorRecord,
    as_array,
    as_mapping,
    describe,
    plain,
    tensors_in,
)
from fdconv_deploy.checkpoints.shards import find_index, read_shards, refuse_one_shard
from fdconv_deploy.errors import CheckpointError

Format = Literal[
    "mmcv 1.x",
    "mmengine training",
    "mmengine published",
    "Lightning",
    "DeepSpeed",
    "detectron2",
    "plain",
    "safetensors",
]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state_dict: names → dense CPU tensors, without wrappers' prefixes.
        meta: the file's ``meta``, plain data only. Empty if there is none.
        format: which of the known layouts the file has.
        dropped: what the file also holds and this leaves out, one phrase each.
        other_weights: names of other networks in the file, for ``weights`` of
            :func:`read_checkpoint`.
        path: where it was read from.
    """

    state_dict: dict[str, Tensor]
    meta: dict[str, Any]
    format: Format
    dropped: tuple[str, ...] = ()
    other_weights: tuple[str, ...] = ()
    path: Path | None = None


def read_checkpoint(path: str | Path, *, weights: str | None = None) -> Checkpoint:
    """Read a checkpoint without running anything in it.

    Args:
        path: a file of mmcv 1.x, mmengine, Lightning, DeepSpeed, detectron2 or plain PyTorch
            (``.pth``, ``.pt``, ``.ckpt``, ``.bin``, ``.pkl``), ``.safetensors``, or the folder or
            index of a checkpoint in several files.
        weights: the entry or prefix to take the weights from, e.g. ``"state_dict_ema"`` or
            ``"teacher"``. By default the trained weights, or the averaged ones if there are no
            others; see :func:`fdconv_deploy.checkpoints.choose_weights.choose`.

    Raises:
        CheckpointError: it cannot be read, needs code to be read, or holds no state dict.
    """
    path = Path(path)
    index = find_index(path)
    if index is not None:
        tensors, meta = read_shards(index, _all_tensors)
        layout: Format = "safetensors" if ".safetensors" in index.name else "plain"
        return _checkpoint(path, None, tensors, meta, layout, weights)
    container = container_of(path)
    refuse_one_shard(path)
    if container == "safetensors":
        tensors, meta = load_safetensors(path)
        return _checkpoint(path, None, tensors, meta, "safetensors", weights)
    file = PickledFile(path, container)
    content = _mapping(path, file.content)
    meta = plain(content.get("meta"))
    meta = meta if isinstance(meta, dict) else {}
    return _checkpoint(path, file, content, meta, _format(content, meta), weights)


def _mapping(path: Path, content: Any) -> Mapping[Any, Any]:
    mapping = as_mapping(content)
    if mapping is not None:
        return mapping
    if isinstance(content, Made) and tensors_in(content):
        raise behind_code(path, "what it holds", content)
    raise CheckpointError(
        f"{path} holds {describe(content)}. Expected a state dict (names → tensors) or a dict "
        "with one in it. Save the network with torch.save(network.state_dict(), path)."
    )


def _checkpoint(
    path: Path,
    file: PickledFile | None,
    content: Mapping[Any, Any],
    meta: dict[str, Any],
    layout: Format,
    weights: str | None,
) -> Checkpoint:
    chosen = choose(path, content, weights)
    found, left = tensors_of(path, chosen.network)
    state = _read(path, file, found)
    if layout == "DeepSpeed" and not any(tensor.numel() for tensor in state.values()):
        raise CheckpointError(
            f"{path} holds names without weights: DeepSpeed's stage 3 keeps them in the other "
            "files of its folder. Gather them with the zero_to_fp32.py that lies there."
        )
    dropped = (*chosen.left, *left, *chosen.network.stripped)
    return Checkpoint(state, meta, layout, dropped, chosen.others, path)


def _all_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every tensor of one part of a checkpoint in several files, and its meta data."""
    container = container_of(path)
    if container == "safetensors":
        return load_safetensors(path)
    file = PickledFile(path, container)
    content = _mapping(path, file.content)
    found = {str(key): value for key, value in content.items() if isinstance(value, TensorRecord)}
    return dict(file.read(found)), {}


def _read(path: Path, file: PickledFile | None, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Records and arrays as tensors, in the file's order."""
    records = {name: value for name, value in found.items() if isinstance(value, TensorRecord)}
    tensors = file.read(records) if file is not None else {}
    result: dict[str, Tensor] = {}
    for name, value in found.items():
        if name in tensors:
            result[name] = tensors[name]
        elif isinstance(value, Tensor):
            result[name] = value.detach()
        else:
            result[name] = _from_array(path, name, value)
    return result


def _from_array(path: Path, name: str, value: Any) -> Tensor:
    array = as_array(value)
    assert array is not None
    native = np.array(array, array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(native)
    except TypeError:
        raise CheckpointError(
            f"{path}: {name} is an array of {array.dtype}, which PyTorch does not have. Expected "
            "float16, float32, float64 or integers; save it as one of them."
        ) from None


def _format(content: Mapping[Any, Any], meta: Mapping[str, Any]) -> Format:
    if "pytorch-lightning_version" in content:
        return "Lightning"
    if "ds_version" in content or "ds_config" in content:
        return "DeepSpeed"
    if "__author__" in content or ("model" in content and "iteration" in content):
        return "detectron2"
    if meta and as_mapping(content.get("state_dict")) is not None:
        if "message_hub" in content or ("mmengine_version" in meta and "optimizer" in content):
            # mmsegmentation's publish tool leaves the message hub in.
            return "mmengine training" if "optimizer" in content else "mmengine published"
        if "mmengine_version" in meta or "cfg" in meta or "dataset_meta" in meta:
            return "mmengine published"
        if {"mmcv_version", "config", "CLASSES"} & set(meta):
            return "mmcv 1.x"
    return "plain"
