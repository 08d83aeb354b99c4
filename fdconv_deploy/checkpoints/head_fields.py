"""A decode head of a checkpoint, from its names and shapes and its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fdconv_deploy.architecture import HeadConfig
from fdconv_deploy.checkpoints.facts import UNSET, Evidence, stated, type_of
from fdconv_deploy.checkpoints.layers import Shapes, dynamic_names
from fdconv_deploy.errors import CheckpointError

HeadType = Literal["UPerHead", "FCNHead"]


def infer_head(
    state: Shapes,
    name: str,
    widths: Sequence[int],
    section: Mapping[str, Any],
    evidence: Evidence,
) -> HeadConfig:
    """One head.

    Args:
        state: the head's tensors, names without ``decode_head.``; only shapes are read.
        name: ``decode_head`` or ``auxiliary_head``.
        widths: channels of each of the backbone's outputs.
        section: the config's section of this head; empty if there is none.
        evidence: takes the facts.

    Raises:
        CheckpointError: a head of another type, or witnesses disagree.
    """
    kind = _type(state, name, section)
    _refuse_unsupported(name, section)

    def settle(field: str, annotation: Any, **knowledge: Any) -> Any:
        knowledge.setdefault("config", stated(section, field))
        return evidence.settle(f"{name}.{field}", annotation, **knowledge)

    classes, channels = state["conv_seg.weight"].shape[:2]
    inputs = _inputs(state, kind)
    values: dict[str, Any] = {
        "type": settle(
            "type", HeadType, config=type_of(section) or UNSET, exact=kind, source="names"
        ),
        "channels": settle("channels", int, exact=channels),
        "num_classes": settle(
            "num_classes",
            int,
            exact=classes,
            tells=f"{name}.conv_seg makes {classes}"
            + (" (binary heads with one output are not supported)" if classes == 1 else ""),
        ),
        "align_corners": settle("align_corners", bool, default=False),
        "in_channels": settle(
            "in_channels",
            tuple[int, ...],
            config=_several(stated(section, "in_channels")),
            exact=inputs,
        ),
        "in_index": _in_index(name, inputs, widths, section, evidence),
    }
    fields = _uper if kind == "UPerHead" else _fcn
    return HeadConfig(**values, **fields(state, settle))


def _uper(state: Shapes, settle: Any) -> dict[str, Any]:
    count = len([key for key in state if key.startswith("psp_") and key.endswith("conv.weight")])
    scales = settle(
        "pool_scales",
        tuple[int, ...],
        default=(1, 2, 3, 6),
        accepts=lambda value: len(value) == count,
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


def _type(state: Shapes, name: str, section: Mapping[str, Any]) -> HeadType:
    kind = type_of(section)
    modules = dict.fromkeys(key.split(".")[0] for key in state)
    dynamic = dynamic_names(state)
    if dynamic:
        raise CheckpointError(
            f"{name}.{dynamic[0]} is an FDConv layer. Expected FDConv in the backbone only; heads "
            "with FDConv layers are not supported yet."
        )
    if "conv_seg.weight" in state:
        if {"psp_modules", "fpn_bottleneck", "bottleneck"} <= set(modules):
            return "UPerHead"
        if set(modules) <= {"convs", "conv_cat", "conv_seg"}:
            return "FCNHead"
    raise CheckpointError(
        f"{name} is {f'a {kind}' if kind else 'of an unknown type'}: it has "
        f"{', '.join(modules) or 'no tensors'}. Expected a UPerHead or an FCNHead; other heads are "
        "not supported yet."
    )


def _refuse_unsupported(name: str, section: Mapping[str, Any]) -> None:
    activation = stated(section, "act_cfg")
    if isinstance(activation, Mapping) and type_of(activation) not in ("ReLU", ""):
        raise CheckpointError(
            f"{name} has act_cfg={type_of(activation)} in the config. Expected ReLU; other "
            "activations are not supported."
        )
    if stated(section, "input_transform") == "resize_concat":
        raise CheckpointError(
            f"{name} has input_transform='resize_concat' in the config, which is not supported. "
            "Expected a head on one feature map, or a UPerHead."
        )


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


def _inputs(state: Shapes, kind: HeadType) -> tuple[int, ...]:
    """Channels of each feature map the head takes."""
    if kind == "UPerHead":
        laterals = sorted(
            (int(key.split(".")[1]), value.shape[1])
            for key, value in state.items()
            if key.startswith("lateral_convs.") and key.endswith(".conv.weight")
        )
        last = next(
            value.shape[1]
            for key, value in state.items()
            if key.startswith("psp_modules.") and key.endswith(".conv.weight")
        )
        return (*(width for _, width in laterals), last)
    if "convs.0.conv.weight" in state:
        return (state["convs.0.conv.weight"].shape[1],)
    if "conv_cat.conv.weight" in state:  # no convs: the input is concatenated to itself
        return (state["conv_cat.conv.weight"].shape[1] // 2,)
    return (state["conv_seg.weight"].shape[1],)


def _in_index(
    name: str,
    inputs: Sequence[int],
    widths: Sequence[int],
    section: Mapping[str, Any],
    evidence: Evidence,
) -> Any:
    strange = [width for width in inputs if width not in widths]
    if strange:
        raise CheckpointError(
            f"{name} takes feature maps of {strange[0]} channels, and the backbone's outputs have "
            f"{tuple(widths)}. Expected a head right behind the backbone; necks and concatenated "
            "inputs are not supported. If out_indices leaves that stage out, correct it."
        )
    config = _several(stated(section, "in_index"))
    if isinstance(config, (list, tuple)):
        config = tuple(i + len(widths) if isinstance(i, int) and i < 0 else i for i in config)
    return evidence.settle(
        f"{name}.in_index",
        tuple[int, ...],
        config=config,
        exact=tuple(list(widths).index(width) for width in inputs),
        tells=f"{name} takes {tuple(inputs)} channels and the backbone's outputs have "
        f"{tuple(widths)}",
    )
