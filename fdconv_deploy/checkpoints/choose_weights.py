"""What a file holds → the state dicts in it, the networks in those, and the one that is meant.

Training scripts put networks into files in many ways: under a key of their own, with an averaged
copy beside them, in wrappers that each add a prefix to all names, with the loss's buffers among
the weights. A network is found here by the names of its parts (``backbone.``, ``decode_head.``),
wherever they stand. What does not belong to it is listed, not dropped in silence.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fdconv_deploy.checkpoints.safe_unpickling import (
    Made,
    TensorRecord,
    as_array,
    as_mapping,
    describe,
    tensors_in,
)
from fdconv_deploy.errors import CheckpointError

# Where weights stand, in the order they are looked for. (mmengine writes the averaged weights,
# which one deploys, to state_dict itself. DeepSpeed's are under module.)
WEIGHT_KEYS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module",
    "params", "weights",
)  # fmt: skip
AVERAGED_KEYS = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "params_ema")
# Entries with tensors that are the state of training, never a network's.
_TRAINING = re.compile(
    r"optim|sched|scaler|random|message_hub|callback|hyper|hparams"
    r"|(^|[_.])(meta|args?|config|cfg|amp|rng|loops)($|[_.])"
)
# Copies that are kept beside the trained weights. A choice goes to the others.
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged|teacher|shadow|momentum)($|[._\d])")

# Parts of OpenMMLab's networks, which stand right below the network's own prefix.
_PARTS = {
    "backbone", "neck", "decode_head", "auxiliary_head", "rpn_head", "roi_head", "bbox_head",
    "mask_head", "panoptic_head", "panoptic_fusion_head",
}  # fmt: skip
# Wrappers that stand between a module and its own parts, anywhere in a name: DataParallel,
# torch.compile, FSDP, activation checkpointing, Lightning Fabric.
_BETWEEN = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
    "_forward_module",
}  # fmt: skip
# Attributes that hold a network of parts not known here.
_HOLDERS = ("model", "ema_model", "net", "network")
_COUNTERS = ("steps", "n_averaged")
# Buffers that profilers (thop) and OpenMMLab's preprocessors leave beside any module's weights.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(total_ops|total_params)$|(^|\.)data_preprocessor\.(mean|std|batch_augments\..*)$"
)
_LOSS = re.compile(r"(^|_)(criterion|criteria|loss|losses)(_|\d|$)")
_METRIC = re.compile(
    r"(^|_)(metrics?|acc|accuracy|m?iou|jaccard|dice|f1|auroc|confmat|psnr|ssim|lpips)(_|\d|$)"
)


@dataclass(frozen=True)
class Network:
    """One network's part of a state dict.

    Attributes:
        entry: dotted keys of the state dict in the file; empty if the file is one.
        root: what stands before its parts in their names, without the last dot; often empty.
        values: names without prefixes → tensors, records of them, or whatever stands there.
        left: phrases about names of the state dict that are no network's.
        stripped: phrases about the prefixes that ``values`` has no more.
    """

    entry: str
    root: str
    values: dict[str, Any]
    left: tuple[str, ...] = ()
    stripped: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Entry and root, as one dotted name."""
        return ".".join(filter(None, (self.entry, self.root)))


@dataclass(frozen=True)
class Chosen:
    """The network that is taken, and what is not.

    Attributes:
        network: the one.
        others: names by which other networks in the file can be chosen.
        left: phrases about what else is in the file.
    """

    network: Network
    others: tuple[str, ...]
    left: tuple[str, ...]


def choose(path: Path, content: Mapping[Any, Any], wanted: str | None = None) -> Chosen:
    """Find the networks in a file and take one.

    Of several, trained weights go before averaged ones and a teacher, ``state_dict`` before other
    entries, a network with FDConv layers before one without, and then the one of most tensors.

    Args:
        path: the file, for error messages.
        content: what it holds.
        wanted: the name of the entry (``state_dict_ema``), of the prefix (``teacher``) or of both
            (``state_dict.teacher``) to take instead.

    Raises:
        CheckpointError: there are no weights, or none of that name.
    """
    entries = _entries(content)
    if not entries:
        raise _no_weights(path, content)
    networks = [network for entry, state in entries.items() for network in _networks(entry, state)]
    networks.sort(key=_rank)
    names = _names(networks)
    if wanted is None:
        network = networks[0]
    else:
        named = [n for n in networks if wanted in (names[id(n)], n.entry, n.root, n.name)]
        if not named:
            error = CheckpointError(
                f"{path} has no weights under {wanted!r}; it has: {', '.join(names.values())}."
            )
            error.command_line = f"{error} Choose one with --weights NAME, or leave it out."
            raise error
        network = named[0]
    taken = network.entry.split(".")[0]
    left = [
        str(key)
        for key in content
        if network.entry and key not in (taken, "meta") and str(key) not in entries
    ]
    others = tuple(names[id(n)] for n in networks if n is not network)
    return Chosen(network, others, (*left, *network.left))


def _rank(network: Network) -> tuple[Any, ...]:
    usual = (*WEIGHT_KEYS, *AVERAGED_KEYS)
    entry = network.entry.split(".")[0]
    return (
        bool(_AVERAGED.search(network.entry)),
        bool(_AVERAGED.search(network.root)),
        usual.index(entry) if entry in usual else len(usual),
        not any(".KSM_Global." in name for name in network.values),
        -len(network.values),
    )


def _names(networks: Sequence[Network]) -> dict[int, str]:
    """For each network, by its id, the shortest name that chooses it and no earlier one."""
    names: dict[int, str] = {}
    for index, network in enumerate(networks):
        before = networks[:index]
        options = [
            (network.entry, [n.entry for n in before]),
            (network.root, [n.root for n in before]),
        ]
        free = [name for name, used in options if name and name not in used]
        names[id(network)] = free[0] if free else network.name or "the state dict itself"
    return names


# State dicts in a file


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor, the record of one, or a pickled numpy array."""
    return isinstance(value, (Tensor, TensorRecord)) or as_array(value) is not None


def _entries(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Dotted keys → state dicts: those under the usual keys first, then any with a network."""
    found: dict[str, Mapping[Any, Any]] = {}
    for key in (*WEIGHT_KEYS, *AVERAGED_KEYS):
        state = as_mapping(content.get(key))
        if state is None:
            continue
        inner = {} if any(map(is_tensor, state.values())) else _inner(key, state)
        found |= inner or {key: state}
    if not any(map(_holds_tensors, found.values())) and any(map(is_tensor, content.values())):
        return {"": content}
    taken = {name.split(".")[0] for name in found}
    for key, value in content.items():
        state = as_mapping(value) if isinstance(key, str) and key not in taken else None
        if state is not None and not _TRAINING.search(key.lower()) and _roots(state):
            found[key] = state
    return found


def _inner(key: str, state: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """State dicts one level down: ``{"model": {"student": …, "teacher": …}}``."""
    inner = {f"{key}.{name}": as_mapping(value) for name, value in state.items()}
    return {
        name: value
        for name, value in inner.items()
        if value is not None and _holds_tensors(value) and not _TRAINING.search(name.lower())
    }


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    return any(map(is_tensor, state.values()))


def _no_weights(path: Path, content: Mapping[Any, Any]) -> CheckpointError:
    seen: set[int] = set()
    for key, value in content.items():
        if _TRAINING.search(str(key).lower()):
            continue
        if isinstance(value, Made) and tensors_in(value, seen):
            return behind_code(path, key, value)
    keys = ", ".join(str(key)[:40] for key in list(content)[:10]) or "nothing"
    return CheckpointError(
        f"{path} holds no weights: expected a state dict, or one under "
        f"{', '.join(WEIGHT_KEYS[:3])}…; found {keys}."
    )


# Networks in a state dict


def _networks(entry: str, state: Mapping[Any, Any]) -> list[Network]:
    """The networks that are told by their parts' names, or else all of it as one."""
    left = [f"{describe(key)} as a name" for key in state if not isinstance(key, str)]
    names = {key: value for key, value in state.items() if isinstance(key, str)}
    stripped: list[str] = []
    left += [f"{key} (a counter)" for key in names if key in _COUNTERS]
    # mmcv's EMA hook keeps a second copy as buffers: `ema_` + the name with _ for dots.
    copies = [key for key in names if key.startswith("ema_") and "." not in key]
    if copies:
        left.append(f"{len(copies)} ema_… buffers (mmcv keeps the weights not deployed there)")
    beside = [key for key in names if _NOT_WEIGHTS.search(key)]
    if beside:
        left.append(
            f"{len(beside)} buffers of a profiler or of the data preprocessor ({beside[0]} …)"
        )
    for key in (*copies, *beside, *(key for key in _COUNTERS if key in names)):
        del names[key]
    names = _without_wrappers(names, stripped)
    roots = _roots(names)
    if not roots:
        return [_as_one(entry, names, left, stripped)]
    groups: dict[str, dict[str, Any]] = {root: {} for root in roots}
    others: list[str] = []
    deepest = sorted(roots, key=len, reverse=True)
    for name, value in names.items():
        root = next((r for r in deepest if not r or name.startswith(f"{r}.")), None)
        inside = name if not root else name[len(root) + 1 :]
        if root is None or _is_of_training(inside):
            others.append(name)
        else:
            groups[root][inside] = value
    left += _listed(others)
    result = []
    for root, values in groups.items():
        prefix = [f"the prefix {root + '.'!r} of its names"] if root else []
        result.append(Network(entry, root, values, tuple(left), (*stripped, *prefix)))
    return result


def _without_wrappers(names: dict[str, Any], stripped: list[str]) -> dict[str, Any]:
    """Names without what wrappers put in between, unless two would become one."""
    plain = {
        name: ".".join(part for part in name.split(".") if part not in _BETWEEN) for name in names
    }
    if len(set(plain.values())) < len(plain) or not all(plain.values()):
        return names
    for wrapper in sorted(_BETWEEN):
        count = sum(wrapper in name.split(".") for name in names)
        if count:
            which = "every name" if count == len(names) else f"{count} names"
            stripped.append(f"the wrapper's {wrapper + '.'!r} of {which}")
    return {plain[name]: value for name, value in names.items()}


def _roots(state: Mapping[Any, Any]) -> list[str]:
    """What stands before ``backbone.``, or before a bare ResNet's ``layer1.``; first ones first."""
    whole: dict[str, bool] = {}
    bare: dict[str, None] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not (is_tensor(value) or isinstance(value, Made)):
            continue
        parts = name.split(".")
        for index, part in enumerate(parts[:-1]):
            root = ".".join(parts[:index])
            if part in _PARTS:
                whole[root] = whole.get(root, False) or part == "backbone"
                break
            if part == "layer1" and parts[index + 1].isdigit():
                bare[root] = None
                break
    return [root for root, backbone in whole.items() if backbone] or list(whole) or list(bare)


def _as_one(
    entry: str, names: dict[str, Any], left: Iterable[str], stripped: Iterable[str]
) -> Network:
    """A network of unknown parts: its names without the attribute they all are in."""
    values = {name: value for name, value in names.items() if not _is_of_training(name)}
    others = [name for name in names if name not in values]
    if not values:
        values, others = names, []
    root = ""
    while values:
        first = next(iter(values)).split(".")[0]
        if first not in _HOLDERS or not all(name.startswith(f"{first}.") for name in values):
            break
        values = {name[len(first) + 1 :]: value for name, value in values.items()}
        root = f"{root}.{first}" if root else first
    prefix = [f"the prefix {root + '.'!r} of its names"] if root else []
    return Network(entry, root, values, (*left, *_listed(others)), (*stripped, *prefix))


def _is_of_training(name: str) -> bool:
    """Whether a name in a network is a loss's or a metric's."""
    first, *inner = name.lower().split(".")
    if first in _PARTS:
        return any(map(_LOSS.search, inner[:-1]))
    metric = _METRIC.search(first) and "head" not in first  # an iou_head is part of a network
    return bool(metric) or any(map(_LOSS.search, (first, *inner[:-1])))


def _listed(names: Iterable[str]) -> list[str]:
    """One phrase per first part of the names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return [
        found[0] if len(found) == 1 else f"{first}.… ({len(found)} entries)"
        for first, found in groups.items()
    ]


# Tensors in a network


def tensors_of(path: Path, network: Network) -> tuple[dict[str, Any], list[str]]:
    """The tensors and arrays among a network's values, and phrases about the others.

    Raises:
        CheckpointError: a tensor is sharded, sparse, quantised or made by code, or there is none.
    """
    flat = [name for name in network.values if name.split(".")[-1].startswith("_flat_param")]
    if flat:
        raise CheckpointError(
            f"{path} holds FSDP's flattened parameters ({flat[0]}). Expected a tensor per name. "
            "Save it with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT)."
        )
    tensors = {name: value for name, value in network.values.items() if is_tensor(value)}
    left: list[str] = []
    seen: set[int] = set()
    for name, value in network.values.items():
        if name in tensors:
            continue
        if isinstance(value, Made) and tensors_in(value, seen):
            raise behind_code(path, name, value)
        left.append(f"{name} ({describe(value)})")
    if not tensors:
        raise CheckpointError(f"{path} holds an empty state dict: there are no weights in it.")
    return tensors, left


_DENSE = "Expected dense weights; save the network before quantising or pruning it."
# What torch's own functions would have rebuilt, and other tensors that are no plain numbers.
_FOREIGN = (
    ("_rebuild_sparse", "is a sparse tensor", _DENSE),
    ("_rebuild_qtensor", "is a quantised tensor", _DENSE),
    ("torchao.", "is a tensor quantised by torchao", _DENSE),
    ("bitsandbytes.", "is a tensor quantised by bitsandbytes", _DENSE),
    ("_rebuild_nested", "is a nested tensor", _DENSE),
    (
        "_rebuild_meta",
        "has a shape but no data (a `meta` tensor)",
        "Save the network after its weights were loaded.",
    ),
    (
        "torch.distributed.",
        "is one process's piece of a sharded tensor (FSDP2's DTensor)",
        "Gather before saving: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        "options=StateDictOptions(full_state_dict=True, cpu_offload=True)).",
    ),
)


def behind_code(path: Path, name: Any, value: Made) -> CheckpointError:
    """The refusal of weights that only running code would make."""
    makers = _makers(value)
    for mark, what, remedy in _FOREIGN:
        if any(mark in maker for maker in makers):
            return CheckpointError(f"{path}: {name} {what}. {remedy}")
    state = as_mapping(value.state) or {}
    if "_modules" in state or "_parameters" in state:
        return CheckpointError(
            f"{path}: {name} is a whole network, pickled as code ({value}). Checkpoints are read "
            "without running code. Where its code is, load it and save its weights alone: "
            "torch.save(network.state_dict(), path)."
        )
    return CheckpointError(
        f"{path}: {name} is made by {value}, which is code and not weights. Checkpoints are read "
        "without running code. If you trust the file, load it where it was written and save plain "
        "tensors: torch.save(network.state_dict(), path)."
    )


def _makers(value: Any) -> list[str]:
    """The names of all code that ``value`` is made by, the outermost first."""
    left = deque([value])
    seen: set[int] = set()
    found: list[str] = []
    while left and len(seen) < 10_000:
        part = left.popleft()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Made):
            found.append(str(part))
            left += [part.maker, part.arguments, part.state]
        elif isinstance(part, (list, tuple)):
            left += part
        elif isinstance(part, dict):
            left += part.values()
        elif not isinstance(part, (str, bytes, int, float, TensorRecord)) and part is not None:
            found.append(str(part))
    return found
