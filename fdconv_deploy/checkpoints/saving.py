"""A trained network → a checkpoint file as mmengine publishes one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import fdconv_deploy
from fdconv_deploy.architecture import Architecture
from fdconv_deploy.checkpoints.mmseg_config import format_config
from fdconv_deploy.errors import CheckpointError


def save_checkpoint(
    path: str | Path,
    state_dict: Mapping[str, Tensor] | nn.Module,
    architecture: Architecture,
    *,
    config_text: str | None = None,
) -> None:
    """Write ``{meta: {cfg, dataset_meta}, state_dict}``, the layout mmengine publishes.

    The config text is generated from ``architecture``, and reading the file back infers an
    equal one. The file appears whole or not at all: it is written beside ``path`` under a
    temporary name, then renamed.

    Args:
        path: where to write. An existing file is replaced; its folder must exist.
        state_dict: names → tensors as in mmsegmentation (``backbone.…``, ``decode_head.…``),
            or the network itself.
        architecture: what the weights belong to.
        config_text: Python config text to store in place of the generated one.

    Raises:
        CheckpointError: the weights do not belong to ``architecture``, or the file can't be
            written.
    """
    path = Path(path)
    weights = state_dict.state_dict() if isinstance(state_dict, nn.Module) else state_dict
    _check(weights, architecture)
    content = {
        "meta": {
            "cfg": format_config(architecture) if config_text is None else config_text,
            "dataset_meta": {
                "classes": architecture.classes,
                "palette": [list(colour) for colour in architecture.palette],
            },
            "fdconv_deploy_version": fdconv_deploy.__version__,
        },
        # Copies: a view would drag its whole storage into the file.
        "state_dict": {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, tensor in weights.items()
        },
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Give a file name in a folder that exists "
            "and that you may write to."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _check(weights: Mapping[str, Tensor], architecture: Architecture) -> None:
    name = "decode_head.conv_seg.weight"
    if name not in weights:
        raise CheckpointError(
            f"The weights to save have no {name}: expected a segmentor's state dict, with names as "
            f"in mmsegmentation, found {', '.join(list(weights)[:3]) or 'nothing'}…"
        )
    found = weights[name].shape[0]
    expected = architecture.decode_head.num_classes
    if found != expected:
        raise CheckpointError(
            f"The weights to save have {found} classes ({name}) and the architecture {expected}. "
            "Give the architecture the network was built from."
        )
    has_auxiliary = any(key.startswith("auxiliary_head.") for key in weights)
    if has_auxiliary != (architecture.auxiliary_head is not None):
        there, wanted = ("an", "none") if has_auxiliary else ("no", "one")
        raise CheckpointError(
            f"The weights to save have {there} auxiliary head and the architecture {wanted}. "
            "Give the architecture the network was built from."
        )
