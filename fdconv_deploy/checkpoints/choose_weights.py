"""Which weights of a file are meant: its state dicts, the networks in them, and the one to take.

Training scripts put networks into files in many ways: under a key of their own, with an averaged
(EMA) copy beside them, in wrappers that each add a prefix to all names, with the loss's buffers
among the weights. A network is found here by the names of its parts (``backbone.``,
``decode_head.``), wherever they stand. What does not belong to it is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from os.path import commonprefix
from pathlib import Path
from typing import Any

from fdconv_deploy.checkpoints.safe_unpickling import (
    Made,
    as_mapping,
    describe,
    is_tensor,
    refusal_of_code,
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
    r"|(^|[_.])(meta|args?|config|cfg|amp|rng|loops)($|[_.])",
    re.I,
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
_WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
    "_forward_module",
}  # fmt: skip
# Attributes that hold a network of parts not known here.
_HOLDERS = {"model", "ema_model", "net", "network"}
# Attributes above a network's parts: a file's names may have any number.
MAX_DEPTH = 20
# Names in a state dict that are no weights: (pattern, how they are listed).
_NOT_WEIGHTS = (
    (re.compile(r"^(steps|n_averaged)$"), "{first} (a counter)"),
    # mmcv's EMA hook keeps a second copy as buffers: `ema_` + the name with _ for dots.
    (
        re.compile(r"^ema_[^.]*$"),
        "{count} ema_… buffers (mmcv keeps the weights not deployed there)",
    ),
    # thop, and OpenMMLab's preprocessors.
    (
        re.compile(
            r"(^|\.)(total_ops|total_params)$"
            r"|(^|\.)data_preprocessor\.(mean|std|batch_augments\..*)$"
        ),
        "{count} buffers of a profiler or of the data preprocessor ({first} …)",
    ),
)
_LOSS = re.compile(r"(^|_)(criterion|criteria|loss|losses)(_|\d|$)", re.I)
_METRIC = re.compile(
    r"(^|_)(metrics?|acc|accuracy|m?iou|jaccard|dice|f1|auroc|confmat|psnr|ssim|lpips)(_|\d|$)",
    re.I,
)


@dataclass(frozen=True)
class _Network:
    """One network's part of a state dict.

    ``entry`` has the dotted keys of the state dict in the file, empty if the file is one, and
    ``root`` what stands before the network's parts in their names, without the last dot.
    """

    entry: str
    root: str
    values: dict[str, Any]
    dropped: tuple[str, ...]

    @property
    def name(self) -> str:
        """Entry and root, as one dotted name."""
        return ".".join(filter(None, (self.entry, self.root))) or "the state dict itself"

    @property
    def rank(self) -> tuple[Any, ...]:
        """The smallest goes first."""
        usual = (*WEIGHT_KEYS, *AVERAGED_KEYS)
        entry = self.entry.split(".")[0]
        return (
            bool(_AVERAGED.search(self.entry)),
            bool(_AVERAGED.search(self.root)),
            usual.index(entry) if entry in usual else len(usual),
            not any(".KSM_Global." in name for name in self.values),
            -len(self.values),
        )


def choose_weights(
    path: Path, content: Mapping[Any, Any], wanted: str | None = None
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Find the networks in a file and take one.

    Of several, trained weights go before averaged ones and a teacher, ``state_dict`` before other
    entries, a network with FDConv layers before one without, and then the one of most tensors.
    ``wanted`` names the entry (``state_dict_ema``), the prefix (``teacher``) or both to take
    instead.

    Returns:
        Names without prefixes → tensors, records of them, or pickled numpy arrays; names by which
        other networks can be chosen; phrases about what else is in the file and about prefixes
        that were taken off.
    """
    entries = _entries(content)
    if not entries:
        raise _no_weights(path, content)
    networks = [network for entry, state in entries.items() for network in _networks(entry, state)]
    networks.sort(key=lambda network: network.rank)
    # The shortest name that chooses a network and no earlier one.
    names: list[str] = []
    entries_before, roots_before = {""}, {""}
    for network in networks:
        own = network.name if network.root in roots_before else network.root
        names.append(own if network.entry in entries_before else network.entry)
        entries_before.add(network.entry)
        roots_before.add(network.root)
    chosen = 0
    if wanted is not None:
        fitting = [i for i, n in enumerate(networks) if wanted in (n.entry, n.root, n.name)]
        if not fitting:
            error = CheckpointError(
                f"{path} has no weights under {wanted!r}; it has: {', '.join(names)}."
            )
            error.command_line = f"{error} Choose one with --weights NAME, or leave it out."
            raise error
        chosen = fitting[0]
    network = networks[chosen]
    used = {network.entry.split(".")[0], "meta", *entries}
    beside = [str(key) for key in content if network.entry and str(key) not in used]
    tensors, left = _tensors(path, network)
    others = (*names[:chosen], *names[chosen + 1 :])
    prefix = [f"the prefix {network.root + '.'!r} of its names"] if network.root else []
    return tensors, others, (*beside, *left, *network.dropped, *prefix)


# State dicts in a file


def _entries(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Dotted keys → state dicts: those under the usual keys first, then any with a network."""
    found: dict[str, Mapping[Any, Any]] = {}
    for key in (*WEIGHT_KEYS, *AVERAGED_KEYS):
        state = as_mapping(content.get(key))
        if state is None:
            continue
        # One level down: {"model": {"student": …, "teacher": …}}.
        inner = {f"{key}.{name}": as_mapping(value) for name, value in state.items()}
        networks = {
            name: value
            for name, value in inner.items()
            if value is not None and _holds_tensors(value) and not _TRAINING.search(name)
        }
        found |= {key: state} if _holds_tensors(state) or not networks else networks
    if not any(map(_holds_tensors, found.values())) and _holds_tensors(content):
        return {"": content}
    taken = {name.split(".")[0] for name in found}
    for key, value in content.items():
        state = as_mapping(value) if isinstance(key, str) and key not in taken else None
        if state is not None and not _TRAINING.search(key) and _roots(state):
            found[key] = state
    return found


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    return any(map(is_tensor, state.values()))


def _no_weights(path: Path, content: Mapping[Any, Any]) -> CheckpointError:
    seen: set[int] = set()
    for key, value in content.items():
        if _TRAINING.search(str(key)):
            continue
        if isinstance(value, Made) and tensors_in(value, seen):
            return refusal_of_code(path, key, value)
    keys = ", ".join(str(key)[:40] for key in list(content)[:10]) or "nothing"
    return CheckpointError(
        f"{path} holds no weights: expected a state dict, or one under "
        f"{', '.join(WEIGHT_KEYS[:3])}…; found {keys}."
    )


# Networks in a state dict


def _networks(entry: str, state: Mapping[Any, Any]) -> list[_Network]:
    """The networks that are found by their parts' names, or else all of it as one."""
    dropped = [f"{describe(key)} as a name" for key in state if not isinstance(key, str)]
    names = {key: value for key, value in state.items() if isinstance(key, str)}
    for pattern, phrase in _NOT_WEIGHTS:
        found = [name for name in names if pattern.search(name)]
        if found:
            dropped.append(phrase.format(count=len(found), first=found[0]))
            names = {name: value for name, value in names.items() if not pattern.search(name)}
    names = _without_wrappers(names, dropped)
    known = _roots(names)
    roots = known or [_holder(names)]
    groups: dict[str, dict[str, Any]] = {root: {} for root in roots}
    others: dict[str, list[str]] = {}
    for name, value in names.items():
        first = name.split(".", MAX_DEPTH)[:-1]
        prefixes = (".".join(first[:count]) for count in range(len(first), -1, -1))
        root = next((prefix for prefix in prefixes if prefix in groups), None)
        inside = name[len(root) + 1 :] if root else name
        if root is None or _is_of_training(inside if known else name):
            others.setdefault(name.split(".")[0], []).append(name)
        else:
            groups[root][inside] = value
    if not known and not any(groups.values()):  # a loss alone
        return [_Network(entry, "", names, tuple(dropped))]
    dropped += (
        found[0] if len(found) == 1 else f"{first}.… ({len(found)} entries)"
        for first, found in others.items()
    )
    phrases = tuple(dropped)  # one for all: there may be as many networks as phrases
    return [_Network(entry, root, values, phrases) for root, values in groups.items()]


def _without_wrappers(names: dict[str, Any], dropped: list[str]) -> dict[str, Any]:
    """Names without what wrappers put in between, unless two would become one."""
    plain = {
        name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names
    }
    if len(set(plain.values())) < len(plain) or not all(plain.values()):
        return names
    for wrapper in sorted(_WRAPPERS):
        count = sum(wrapper in name.split(".") for name in names)
        if count:
            which = "every name" if count == len(names) else f"{count} names"
            dropped.append(f"the wrapper's {wrapper + '.'!r} of {which}")
    return {plain[name]: value for name, value in names.items()}


def _roots(state: Mapping[Any, Any]) -> list[str]:
    """What stands before ``backbone.``, or before a bare ResNet's ``layer1.``; first ones first."""
    whole: dict[str, bool] = {}
    bare: dict[str, None] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not (is_tensor(value) or isinstance(value, Made)):
            continue
        parts = name.split(".", MAX_DEPTH)
        for index, part in enumerate(parts[:-1]):
            if part in _PARTS:
                root = ".".join(parts[:index])
                whole[root] = whole.get(root, False) or part == "backbone"
                break
            if part == "layer1" and parts[index + 1].isdigit():
                bare[".".join(parts[:index])] = None
                break
    return [root for root, backbone in whole.items() if backbone] or list(whole) or list(bare)


def _holder(names: Iterable[str]) -> str:
    """The attributes that a network of unknown parts stands in, as ``model`` of ``model.a``."""
    parents = [name.split(".")[:-1] for name in names if not _is_of_training(name)]
    shared = commonprefix(parents)  # noqa: RUF071 - of lists, so part by part
    return ".".join(takewhile(_HOLDERS.__contains__, shared))


def _is_of_training(name: str) -> bool:
    """Whether a name in a network is a loss's or a metric's."""
    first, *inner = name.split(".")
    if first in _PARTS:
        return any(map(_LOSS.search, inner[:-1]))
    metric = _METRIC.search(first) and "head" not in first  # an iou_head is part of a network
    return bool(metric) or any(map(_LOSS.search, (first, *inner[:-1])))


def _tensors(path: Path, network: _Network) -> tuple[dict[str, Any], list[str]]:
    """The tensors and arrays among a network's values, and phrases about the others."""
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
            raise refusal_of_code(path, name, value)
        left.append(f"{name} ({describe(value)})")
    if not tensors:
        raise CheckpointError(f"{path} holds an empty state dict: there are no weights in it.")
    return tensors, left
