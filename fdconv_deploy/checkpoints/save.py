"""A trained network → a checkpoint file as mmengine publishes one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from fdconv_deploy.atomic_write import atomic_path
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.config import DetectorConfig, QueryHeadConfig, SegmentorConfig
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.version import __version__


def save_checkpoint(
    path: str | Path,
    state_dict: Mapping[str, Tensor] | nn.Module,
    architecture: SegmentorConfig | DetectorConfig,
    *,
    config_text: str | None = None,
) -> None:
    """Write a segmentor as mmengine publishes one, a detector as mmdetection 2.x saves one.

    The first is ``{meta: {cfg, dataset_meta}, state_dict}``, the second ``{meta: {config,
    CLASSES, PALETTE}, state_dict}``. The config text is generated from ``architecture``, and
    reading the file back infers an equal one. The file appears whole or not at all.

    Args:
        path: where to write. An existing file is replaced; folders that are missing are made.
        state_dict: names → tensors as in mmsegmentation (``backbone.…``, ``decode_head.…``) or
            mmdetection (``roi_head.…``), or the network itself.
        architecture: what the weights belong to.
        config_text: Python config text to store in place of the generated one.

    Raises:
        CheckpointError: the weights do not belong to ``architecture``, or the file can't be
            written.
    """
    weights = state_dict.state_dict() if isinstance(state_dict, nn.Module) else state_dict
    palette = [list(colour) for colour in architecture.palette]
    text = format_config(architecture) if config_text is None else config_text
    meta: dict[str, Any]
    if isinstance(architecture, DetectorConfig):
        classes, library, background = architecture.bbox_head.num_classes, "mmdetection", 1
        _check_head(weights, "roi_head.bbox_head.fc_cls.weight", classes, library, background)
        _check_part(weights, "roi_head.mask_head", architecture.mask_head)
        meta = {"config": text, "CLASSES": architecture.classes, "PALETTE": palette}
    else:
        head = architecture.decode_head
        outputs, name = head.outputs, "conv_seg"
        if isinstance(head, QueryHeadConfig):
            outputs = head.class_outputs
            name = "cls_embed" if head.type == "Mask2FormerHead" else "class_embed"
        _check_head(weights, f"decode_head.{name}.weight", outputs, "mmsegmentation")
        _check_part(weights, "auxiliary_head", architecture.auxiliary_head)
        meta = {"cfg": text, "dataset_meta": {"classes": architecture.classes, "palette": palette}}
    write_checkpoint(Path(path), weights, meta)


def _check_head(
    weights: Mapping[str, Tensor], name: str, expected: int, library: str, background: int = 0
) -> None:
    if name not in weights:
        kind = {"mmdetection": "detector", "mmsegmentation": "segmentor"}[library]
        raise CheckpointError(
            f"The weights to save have no {name}: expected a {kind}'s state dict, with names as "
            f"in {library}, found {', '.join(list(weights)[:3]) or 'nothing'}…"
        )
    found = weights[name].shape[0] - background
    if found != expected:
        raise CheckpointError(
            f"The weights to save have {found} classes ({name}) and the architecture {expected}. "
            "Give the architecture the network was built from."
        )


def _check_part(weights: Mapping[str, Tensor], name: str, expected: BaseModel | None) -> None:
    has_part = any(key.startswith(f"{name}.") for key in weights)
    if has_part != (expected is not None):
        there, wanted = ("a", "none") if has_part else ("no", "one")
        part = name.split(".")[-1].replace("_", " ")
        raise CheckpointError(
            f"The weights to save have {there} {part} and the architecture {wanted}. "
            "Give the architecture the network was built from."
        )


def write_checkpoint(path: Path, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``{meta, state_dict}``: a file that appears whole or not at all.

    A ``.safetensors`` file holds the tensors and, of ``meta``, what is text.
    """
    # Copied: a view would drag its whole storage into the file.
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in state.items()
    }
    meta = {**meta, "fdconv_deploy_version": __version__}
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            if path.suffix == ".safetensors":
                texts = {key: value for key, value in meta.items() if isinstance(value, str)}
                file.write(safetensors.torch.save(tensors, texts))
            else:
                torch.save({"meta": meta, "state_dict": tensors}, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Give a file name in a folder that you "
            "may write to."
        ) from None
