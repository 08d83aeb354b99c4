"""Tensors and what is said of them → a file that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.version import __version__


def write_checkpoint(path: Path, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``{meta, state_dict}`` beside ``path`` under a temporary name, then rename.

    A ``.safetensors`` file holds the tensors and, of ``meta``, what is text.

    Args:
        path: an existing file is replaced; its folder must exist.
        state: names → tensors, copied: a view would drag its whole storage into the file.
        meta: plain data; this package's version is added.

    Raises:
        CheckpointError: the file can't be written.
    """
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in state.items()
    }
    said = {**meta, "fdconv_deploy_version": __version__}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            if path.suffix == ".safetensors":
                texts = {key: value for key, value in said.items() if isinstance(value, str)}
                file.write(safetensors.torch.save(tensors, texts))
            else:
                torch.save({"meta": said, "state_dict": tensors}, file)
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
