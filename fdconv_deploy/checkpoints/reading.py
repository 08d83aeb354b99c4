"""A checkpoint file → its state dict and what was written beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fdconv_deploy.checkpoints.files import Container, container_of, load_pickled, load_safetensors
from fdconv_deploy.checkpoints.stand_ins import plain
from fdconv_deploy.errors import CheckpointError

Format = Literal["mmcv 1.x", "mmengine training", "mmengine published", "plain", "safetensors"]

# Where weights stand, in the order they are looked for: trained ones before averaged ones.
# (mmengine writes the averaged weights, which one deploys, to state_dict itself.)
WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network")
AVERAGED_KEYS = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")

# Wrappers' prefixes: DataParallel, torch.compile, Lightning, averaged models.
WRAPPERS = ("module.", "_orig_mod.", "model.", "ema_model.", "net.", "network.")
_COUNTERS = ("steps", "n_averaged")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state_dict: names → dense CPU tensors, without wrappers' prefixes.
        meta: the file's ``meta``, plain data only. Empty if there is none.
        format: which of the known layouts the file has.
        dropped: what the file also holds and this leaves out, one phrase each.
        path: where it was read from.
    """

    state_dict: dict[str, Tensor]
    meta: dict[str, Any]
    format: Format
    dropped: tuple[str, ...] = ()
    path: Path | None = None


def read_checkpoint(path: str | Path, *, weights: str | None = None) -> Checkpoint:
    """Read a checkpoint without running anything in it.

    Args:
        path: a ``.pth``/``.pt`` file of mmcv 1.x, mmengine or plain PyTorch, or ``.safetensors``.
        weights: the entry to take the weights from, e.g. ``"state_dict_ema"``. By default the
            trained weights, or the averaged ones if there are no others.

    Raises:
        CheckpointError: it cannot be read, needs code to be read, or holds no state dict.
    """
    path = Path(path)
    container = container_of(path)
    if container == "safetensors":
        tensors, meta = load_safetensors(path)
        state, dropped = _clean(path, tensors)
        return Checkpoint(state, meta, "safetensors", tuple(dropped), path)
    content = load_pickled(path, container)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds {_kind(content)}. Expected a state dict (names → tensors) or a dict "
            "with one in it. Save the network with torch.save(network.state_dict(), path)."
        )
    found, left = _weights_in(path, content, weights)
    state, dropped = _clean(path, found)
    raw_meta = content.get("meta")
    meta = plain(raw_meta) if isinstance(raw_meta, dict) else {}
    return Checkpoint(state, meta, _format(content, container), (*left, *dropped), path)


def _weights_in(
    path: Path, content: Mapping[Any, Any], wanted: str | None
) -> tuple[Mapping[Any, Any], list[str]]:
    """The state dict in ``content`` and phrases about what stands beside it."""
    nested = [k for k in (*WEIGHT_KEYS, *AVERAGED_KEYS) if isinstance(content.get(k), Mapping)]
    if wanted is not None:
        if not isinstance(content.get(wanted), Mapping):
            there = ", ".join(nested) or "no nested state dict"
            raise CheckpointError(f"{path} has no weights under {wanted!r}; it has: {there}.")
        nested = [wanted, *(k for k in nested if k != wanted)]
    if not nested:
        if not any(isinstance(value, Tensor) for value in content.values()):
            keys = ", ".join(map(str, list(content)[:10])) or "nothing"
            raise CheckpointError(
                f"{path} holds no weights: expected a state dict, or one under "
                f"{', '.join(WEIGHT_KEYS[:3])}…; found {keys}."
            )
        return content, []
    chosen = nested[0]
    left = []
    for key in content:
        if key in (chosen, "meta"):
            continue
        if key in nested:
            left.append(f"{key} (other weights; weights={key!r} takes them instead)")
        else:
            left.append(str(key))
    return content[chosen], left


def _clean(path: Path, found: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Names without wrappers' prefixes, tensors checked to be dense and whole."""
    strange = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if not found or len(strange) == len(found):
        raise CheckpointError(f"{path} holds an empty state dict: there are no weights in it.")
    if strange or not all(isinstance(key, str) for key in found):
        names = ", ".join(f"{key} ({_kind(found[key])})" for key in strange[:10])
        raise CheckpointError(
            f"{path}: a state dict holds tensors under text names only, found "
            f"{names or 'other names'}{_more(len(strange))}. "
            "Save the weights with torch.save(network.state_dict(), path)."
        )
    _check_tensors(path, found)
    state = {key: tensor.detach() for key, tensor in found.items() if key not in _COUNTERS}
    dropped = [f"{key} (a counter)" for key in found if key in _COUNTERS]
    # mmcv's EMA hook keeps a second copy as buffers: `ema_` + the name with _ for dots.
    copies = {key for key in state if key.startswith("ema_") and "." not in key}
    if copies:
        dropped.append(f"{len(copies)} ema_… buffers (mmcv keeps the weights not deployed there)")
        state = {key: tensor for key, tensor in state.items() if key not in copies}
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPERS:
            if state and all(key.startswith(prefix) for key in state):
                state = {key[len(prefix) :]: tensor for key, tensor in state.items()}
                dropped.append(f"the prefix {prefix!r} of every name")
                stripped = True
    return state, dropped


def _check_tensors(path: Path, found: Mapping[str, Tensor]) -> None:
    for key, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise CheckpointError(
                f"{path}: {key} is a sparse, nested or quantised tensor. Expected dense weights; "
                "save the network before quantising or pruning it."
            )
        if tensor.is_meta:
            raise CheckpointError(
                f"{path}: {key} has a shape but no data (a `meta` tensor). "
                "Save the network after its weights were loaded."
            )
        stored = tensor.untyped_storage().nbytes()
        # Strides of zero let a few bytes pose as a tensor of any size.
        if tensor.numel() * tensor.element_size() > max(stored, 1 << 20):
            raise CheckpointError(
                f"{path}: {key} claims {tuple(tensor.shape)} elements but the file stores {stored} "
                "bytes for it. Get the original file again."
            )


def _format(content: Mapping[Any, Any], container: Container) -> Format:
    meta = content.get("meta")
    if isinstance(meta, Mapping) and isinstance(content.get("state_dict"), Mapping):
        if "message_hub" in content or ("mmengine_version" in meta and "optimizer" in content):
            return "mmengine training"
        if "mmengine_version" in meta or "cfg" in meta or "dataset_meta" in meta:
            return "mmengine published"
        if {"mmcv_version", "config", "CLASSES"} & set(meta):
            return "mmcv 1.x"
    return "plain"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a single tensor"
    if value is None:
        return "nothing"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _more(count: int) -> str:
    return f" and {count - 10} more" if count > 10 else ""
