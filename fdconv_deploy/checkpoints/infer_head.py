"""A decode head of a checkpoint, from its names and shapes and its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from fdconv_deploy.checkpoints.evidence import UNSET, Evidence, stated, type_of
from fdconv_deploy.checkpoints.infer_head_type import head_by_names, head_type
from fdconv_deploy.checkpoints.infer_layers import Shapes
from fdconv_deploy.config import BINARY_THRESHOLD, HEAD_CONFIGS, HeadConfig, HeadType
from fdconv_deploy.errors import CheckpointError

# What mmsegmentation's pspnet_r50-d8, deeplabv3_r50-d8 and deeplabv3plus_r50-d8 have in common,
# for weights without a config. A config that is silent means the classes' own defaults instead.
_STOCK_BACKBONE: dict[str, Any] = {
    "strides": (1, 2, 1, 1),
    "dilations": (1, 1, 2, 4),
    "contract_dilation": True,
}
_STOCK_DILATIONS = (1, 12, 24, 36)


def stock_backbone(state: Shapes) -> dict[str, Any]:
    """Backbone settings of the stock config that has such a head, by its tensors' names.

    Args:
        state: the head's tensors, names without ``decode_head.``.

    Returns:
        Those that differ from the backbone's own defaults.
    """
    dilated = ("PSPHead", "ASPPHead", "DepthwiseSeparableASPPHead")
    return _STOCK_BACKBONE if head_by_names(state) in dilated else {}


def infer_head(
    state: Shapes,
    name: str,
    widths: Sequence[int],
    section: Mapping[str, Any],
    evidence: Evidence,
    *,
    names: int = 0,
) -> HeadConfig:
    """One head.

    Args:
        state: the head's tensors, names without ``decode_head.``; only shapes are read.
        name: ``decode_head`` or ``auxiliary_head``.
        widths: channels of each of the backbone's outputs.
        section: the config's section of this head; empty if there is none.
        evidence: takes the facts.
        names: how many class names there are, 0 where there are none: they tell how many
            classes a head with one output has, when its config does not.

    Raises:
        CheckpointError: a head of another type, or witnesses disagree.
    """
    asked = evidence.overrides.get(f"{name}.type")
    kind = head_type(state, name, section, asked=asked)
    _refuse_unsupported(kind, name, section)

    def settle(field: str, annotation: Any, **knowledge: Any) -> Any:
        knowledge.setdefault("config", stated(section, field))
        return evidence.settle(f"{name}.{field}", annotation, **knowledge)

    makes, channels = _shape(state, "conv_seg.weight")[:2]
    inputs = _inputs(state, kind)
    values: dict[str, Any] = {
        "type": settle(
            "type", HeadType, config=type_of(section) or UNSET, exact=kind, source="names"
        ),
        "channels": settle("channels", int, exact=channels),
        **_outputs(makes, name, section, settle, names),
        "align_corners": settle("align_corners", bool, default=False),
        "norm": _norm(state, name, section, settle),
    }
    if kind != "UPerHead":
        values["input_transform"], outputs = _joined(name, inputs[0], widths, settle)
    else:
        outputs = tuple(list(widths).index(width) for width in inputs if width in widths)
        if len(outputs) < len(inputs):
            raise _foreign(name, next(w for w in inputs if w not in widths), widths)
    values["in_index"] = _in_index(
        name, outputs, widths, section, kind == "UPerHead" or len(outputs) == 1, settle
    )
    values["in_channels"] = settle(
        "in_channels",
        tuple[int, ...],
        config=_several(stated(section, "in_channels")),
        exact=tuple(widths[i] for i in values["in_index"]),
    )
    fields: dict[HeadType, Callable[[], dict[str, Any]]] = {
        "UPerHead": lambda: _pyramid(state, settle),
        "FCNHead": lambda: _fcn(state, settle),
        "PSPHead": lambda: _pyramid(state, settle),
        "ASPPHead": lambda: _aspp(state, section, settle),
        "DepthwiseSeparableASPPHead": lambda: (
            _aspp(state, section, settle) | _finer(state, name, widths, settle)
        ),
    }
    return HEAD_CONFIGS[kind](**values, **fields[kind]())


def _outputs(
    outputs: int, name: str, section: Mapping[str, Any], settle: Any, names: int
) -> dict[str, Any]:
    """How many classes ``outputs`` channels of logits tell apart, and how.

    As mmsegmentation 1.2.2's ``BaseDecodeHead``: there is an output for each class, or one
    output and a threshold for a head of two classes (or of one, the other being the rest).
    """
    one = outputs == 1
    classes = stated(section, "num_classes")
    origin = {"config": classes}
    if one and classes is UNSET and names in (1, 2):
        origin = {"config": names, "config_name": "the checkpoint's meta"}
    count = settle(
        "num_classes",
        int,
        **origin,
        **({"default": 2, "accepts": lambda value: value in (1, 2)} if one else {"exact": outputs}),
        tells=f"{name}.conv_seg has one output, which tells two classes apart (num_classes=2, or 1 "
        "where the other class is the rest)"
        if one
        else f"{name}.conv_seg makes {outputs}",
    )
    settle(
        "out_channels",
        int | None,
        accepts=lambda value: value == outputs or (value is None and (one or count == outputs)),
        derived=outputs,
        tells=f"{name}.conv_seg makes {outputs}",
        matters=one,
    )
    threshold = stated(section, "threshold")
    matters = one and name == "decode_head"  # an auxiliary head is for training only
    probability = settle(
        "threshold",
        float | None,
        config=UNSET if threshold is None or not one else threshold,
        default=BINARY_THRESHOLD if one else None,
        accepts=lambda value: value is None if not one else value is not None and 0 <= value <= 1,
        tells="a threshold is a probability, from 0 to 1"
        if one
        else f"{name} has {outputs} outputs, of which the highest wins",
        matters=matters,
    )
    return {
        "num_classes": count,
        "out_channels": None if count == outputs else 1,
        "threshold": probability,
    }


def _pyramid(state: Shapes, settle: Any) -> dict[str, Any]:
    count = len([key for key in state if key.startswith("psp_") and key.endswith("conv.weight")])
    scales = settle(
        "pool_scales",
        tuple[int, ...],
        default=(1, 2, 3, 6),
        accepts=lambda value: len(value) == count and min(value) > 0,
        tells=f"the weights have {count} pooling branches",
    )
    return {"pool_scales": scales}


def _fcn(state: Shapes, settle: Any) -> dict[str, Any]:
    count = len({key.split(".")[1] for key in state if key.startswith("convs.")})
    kernels = {
        value.shape[2]
        for key, value in state.items()
        if key.endswith(".conv.weight") and value.ndim == 4
    }
    if len(kernels) > 1:
        raise CheckpointError(
            f"The FCN head's convolutions have kernels {sorted(kernels)}. Expected one kernel_size."
        )
    return {
        "num_convs": settle("num_convs", int, exact=count, source="names"),
        "concat_input": settle(
            "concat_input", bool, exact="conv_cat.conv.weight" in state, source="names"
        ),
        "kernel_size": settle(
            "kernel_size",
            int,
            default=3,
            exact=kernels.pop() if kernels else UNSET,
            matters=count > 0,
        ),
        "dilation": settle("dilation", int, default=1, matters=count > 0),
    }


def _aspp(state: Shapes, section: Mapping[str, Any], settle: Any) -> dict[str, Any]:
    """The dilations: a branch of dilation 1 has a 1×1 kernel, the others 3×3."""
    single: dict[int, bool] = {}
    for key, value in state.items():
        if key.startswith("aspp_modules.") and key.endswith(".conv.weight") and value.ndim == 4:
            number = key.split(".")[1]
            if number.isdigit() and ".pointwise_conv." not in key:
                single[int(number)] = value.shape[2] == 1
    ones = [single[i] for i in sorted(single)]
    kernels = ", ".join("1×1" if one else "3×3" for one in ones)
    stock = not section
    dilations = settle(
        "dilations",
        tuple[int, ...],
        default=_STOCK_DILATIONS if stock else (1, 6, 12, 18),
        accepts=lambda value: [d == 1 for d in value] == ones and all(d > 0 for d in value),
        tells=f"the weights have {len(ones)} branches of {kernels} kernels, and a branch is 1×1 "
        "where its dilation is 1",
        note="those of the stock d8 configs; d16 ones have 1, 6, 12, 18" if stock else "",
    )
    return {"dilations": dilations}


def _finer(state: Shapes, name: str, widths: Sequence[int], settle: Any) -> dict[str, Any]:
    """The finer feature map of DeepLabV3+."""
    weight = "c1_bottleneck.conv.weight"
    out, into = _shape(state, weight)[:2] if weight in state else (0, 0)
    if into not in (0, widths[0]):
        raise CheckpointError(
            f"{name}.c1_bottleneck takes {into} channels, and the backbone's first output has "
            f"{widths[0]}. Expected them to be equal; if out_indices leaves a stage out, correct "
            "it."
        )
    return {
        "c1_in_channels": settle("c1_in_channels", int, exact=into),
        "c1_channels": settle("c1_channels", int, exact=out),
    }


def _norm(state: Shapes, name: str, section: Mapping[str, Any], settle: Any) -> bool:
    """Whether batch normalisation follows the convolutions, as the names beside them tell."""
    suffix = ".conv.weight"
    modules = [key.removesuffix(suffix) for key in state if key.endswith(suffix)]
    bare = [module for module in modules if f"{module}.bn.running_var" not in state]
    biased = all(f"{module}.conv.bias" in state for module in modules)
    if bare and (len(bare) < len(modules) or not biased):
        owners = [key.rpartition(".")[0] for key in state if key.startswith(f"{bare[0]}.")]
        others = {owner.rpartition(".")[2] for owner in owners} - {"conv", "bn"}
        found = f"normalised by {', '.join(sorted(others))}" if others else "without bn.running_var"
        raise CheckpointError(
            f"{name}.{bare[0]} is a convolution {found}. Expected BN or SyncBN after every "
            "convolution of the head, or biases and no normalisation at all; others are not "
            "supported."
        )
    there = not bare
    written = stated(section, "norm_cfg")
    norm: bool = settle(
        "norm",
        bool,
        config=UNSET if written is UNSET else written is not None,
        exact=there,
        source="names",
        tells=f"the weights have {'BatchNorms' if there else 'biases and no normalisation'}",
        matters=not there,
    )
    return norm


def _refuse_unsupported(kind: HeadType, name: str, section: Mapping[str, Any]) -> None:
    activation = stated(section, "act_cfg")
    if activation is not UNSET:
        found = type_of(activation) if isinstance(activation, Mapping) else activation
        if found != "ReLU":
            raise CheckpointError(
                f"{name} has act_cfg={found} in the config. Expected ReLU; other activations are "
                "not supported."
            )
    transform = stated(section, "input_transform")
    if kind == "UPerHead" and transform not in (UNSET, None, "multiple_select"):
        raise CheckpointError(
            f"{name} is a UPerHead with input_transform={transform!r} in the config. Expected none "
            "there: it takes each feature map by itself."
        )


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


def _shape(state: Shapes, key: str) -> tuple[int, ...]:
    """Of a convolution's weight."""
    tensor = state.get(key)
    if tensor is None or tensor.ndim != 4:
        found = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise CheckpointError(
            f"The head's {key} {found}. Expected a convolution's weight, (out, in, height, width); "
            "the file may be cut."
        )
    return tuple(tensor.shape)


def _inputs(state: Shapes, kind: HeadType) -> tuple[int, ...]:
    """Channels of each feature map the head takes; those it joins together as one."""
    if kind == "UPerHead":
        laterals = sorted(
            (int(key.split(".")[1]), _shape(state, key)[1])
            for key in state
            if key.startswith("lateral_convs.") and key.endswith(".conv.weight")
        )
        return (*(width for _, width in laterals), _shape(state, "psp_modules.0.1.conv.weight")[1])
    if kind == "PSPHead":
        return (_shape(state, "psp_modules.0.1.conv.weight")[1],)
    if kind in ("ASPPHead", "DepthwiseSeparableASPPHead"):
        return (_shape(state, "image_pool.1.conv.weight")[1],)
    if "convs.0.conv.weight" in state:
        return (_shape(state, "convs.0.conv.weight")[1],)
    if "conv_cat.conv.weight" in state:  # no convs: the input is concatenated to itself
        return (_shape(state, "conv_cat.conv.weight")[1] // 2,)
    return (_shape(state, "conv_seg.weight")[1],)


def _joined(
    name: str, channels: int, widths: Sequence[int], settle: Any
) -> tuple[str | None, tuple[int, ...]]:
    """``input_transform`` of a head on one feature map, and which outputs that map is made of.

    Widths double from stage to stage, so that a number of channels tells which they are.
    """
    found = next(
        (
            chosen
            for count in range(1, len(widths) + 1)
            for chosen in combinations(range(len(widths)), count)
            if sum(widths[i] for i in chosen) == channels
        ),
        None,
    )
    if found is None:
        raise _foreign(name, channels, widths)
    # One map "joined" is that map.
    transforms = (None, "resize_concat") if len(found) == 1 else ("resize_concat",)
    transform = settle(
        "input_transform",
        Literal["resize_concat"] | None,
        accepts=lambda value: value in transforms,
        derived=transforms[0],
        tells=f"{name} takes {channels} channels and the backbone's outputs have {tuple(widths)}",
        matters=len(found) > 1,
    )
    return transform, found


def _in_index(
    name: str,
    outputs: tuple[int, ...],
    widths: Sequence[int],
    section: Mapping[str, Any],
    ordered: bool,
    settle: Any,
) -> tuple[int, ...]:
    """``in_index``; ``ordered`` says whether the weights tell the order of ``outputs``, too."""
    written = _several(stated(section, "in_index"))
    if isinstance(written, (list, tuple)):
        written = tuple(i + len(widths) if isinstance(i, int) and i < 0 else i for i in written)
    knowledge: dict[str, Any] = {"exact": outputs}
    if not ordered:
        knowledge = {
            "default": outputs,
            "accepts": lambda value: sorted(value) == list(outputs),
            "note": "the weights tell which, not in what order",
        }
    index: tuple[int, ...] = settle(
        "in_index",
        tuple[int, ...],
        config=written,
        tells=f"{name} takes {tuple(widths[i] for i in outputs)} channels and the backbone's "
        f"outputs have {tuple(widths)}",
        **knowledge,
    )
    return index


def _foreign(name: str, channels: int, widths: Sequence[int]) -> CheckpointError:
    return CheckpointError(
        f"{name} takes feature maps of {channels} channels, and the backbone's outputs have "
        f"{tuple(widths)}. Expected a head right behind the backbone; necks are not supported. If "
        "out_indices leaves a stage out, correct it."
    )
