"""A segmentor's decode head: which of mmsegmentation's it is, and its settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import combinations, permutations
from typing import Any, get_args

from fdconv_deploy.checkpoints.config_parser import UNSET, Section
from fdconv_deploy.checkpoints.infer_classes_and_preprocessing import count_names
from fdconv_deploy.checkpoints.settings import (
    CHECKPOINT_META,
    Evidence,
    SettingResolver,
    from_first,
)
from fdconv_deploy.checkpoints.state_dict import Shapes, dynamic_names, part, shape_of
from fdconv_deploy.config import BINARY_THRESHOLD, HEAD_CONFIGS, HeadConfig, HeadType
from fdconv_deploy.errors import CheckpointError

Head = SettingResolver[HeadConfig]
SUPPORTED: tuple[HeadType, ...] = get_args(HeadType)
_SUPPORTED = f"Supported decode heads: {', '.join(SUPPORTED)}."

# Modules each head has, and those that depend on its settings.
_MODULES: dict[HeadType, tuple[set[str], set[str]]] = {
    "UPerHead": (
        {"psp_modules", "bottleneck", "fpn_bottleneck", "conv_seg"},
        {"lateral_convs", "fpn_convs"},
    ),
    "SegformerHead": ({"convs", "fusion_conv", "conv_seg"}, set()),
    "FCNHead": ({"conv_seg"}, {"convs", "conv_cat"}),
    "PSPHead": ({"psp_modules", "bottleneck", "conv_seg"}, set()),
    "ASPPHead": ({"image_pool", "aspp_modules", "bottleneck", "conv_seg"}, set()),
    "DepthwiseSeparableASPPHead": (
        {"image_pool", "aspp_modules", "bottleneck", "sep_bottleneck", "conv_seg"},
        {"c1_bottleneck"},
    ),
}
# Heads that take each of several feature maps by itself, and where the first convolutions of all
# of these but UPerHead's last one stand.
_EACH = {"UPerHead": "lateral_convs.", "SegformerHead": "convs."}
# The convolution that takes the backbone's feature map, of the first module there is.
_FIRST_CONVOLUTIONS = ("psp_modules.0.1.conv", "image_pool.1.conv", "convs.0.conv", "conv_cat.conv")
# Modules that only one of the other heads has: to refuse it by its name.
_OTHER_HEADS = {
    "ANNHead": {"fusion", "context"},
    "APCHead": {"acm_modules"},
    "CCHead": {"cca"},
    "DAHead": {"pam_in_conv", "cam_in_conv"},
    "DDRHead": {"head", "aux_head"},
    "DMHead": {"dcm_modules"},
    "DNLHead": {"dnl_block"},
    "DPTHead": {"reassemble_blocks"},
    "EMAHead": {"ema_module"},
    "EncHead": {"enc_module"},
    "FPNHead": {"scale_heads"},
    "GCHead": {"gc_block"},
    "ISAHead": {"global_relation", "local_relation"},
    "IterativeDecodeHead (K-Net)": {"kernel_generate_head"},
    "LRASPPHead": {"aspp_conv", "conv_ups"},
    "LightHamHead": {"hamburger"},
    "MaskFormerHead": {"pixel_decoder", "query_embed"},
    "NLHead": {"nl_block"},
    "OCRHead": {"object_context_block"},
    "PIDHead": {"i_head", "p_head", "d_head"},
    "PSAHead": {"attention", "proj"},
    "PointHead": {"fcs", "fc_seg"},
    "SETRUPHead": {"up_convs", "norm"},
    "SETRMLAHead": {"up_convs"},
    "STDCHead": {"laplacian_kernel", "fusion_kernel"},
    "SegmenterMaskTransformerHead": {"cls_emb", "classes_proj"},
    "SideAdapterCLIPHead": {"side_adapter_network"},
}
# What mmsegmentation's pspnet_r50-d8, deeplabv3_r50-d8 and deeplabv3plus_r50-d8 have in common,
# for weights without a config. A config without them means the classes' own defaults instead.
_STOCK_BACKBONE: dict[str, Any] = {
    "strides": (1, 2, 1, 1),
    "dilations": (1, 1, 2, 4),
    "contract_dilation": True,
}
_STOCK_DILATIONS = (1, 12, 24, 36)
_shape = partial(shape_of, rank=4, owner="head")
_BRANCH = re.compile(r"aspp_modules\.(\d+)\.(?:depthwise_conv\.)?conv\.weight$")


def stock_backbone(state: Shapes) -> dict[str, Any]:
    """Backbone settings of the stock config with such a head, where they differ from defaults."""
    dilated = ("PSPHead", "ASPPHead", "DepthwiseSeparableASPPHead")
    return _STOCK_BACKBONE if _type_by_names(part(state, "decode_head.")) in dilated else {}


def infer_head(network: Shapes, name: str, widths: Sequence[int], evidence: Evidence) -> HeadConfig:
    """The ``decode_head`` or ``auxiliary_head`` over outputs of ``widths`` channels."""
    state, section = part(network, f"{name}."), evidence.config.section("model", name)
    kind = _head_type(state, name, section, evidence.overrides.get(f"{name}.type"))
    norm, activation, transform, channels = (
        section.stated(name) for name in ("norm_cfg", "act_cfg", "input_transform", "in_channels")
    )
    activation = section.section("act_cfg").type or activation
    Section({"act_cfg": activation}).refuse_others(name, act_cfg="ReLU")
    if kind in _EACH and transform != "multiple_select":
        section.refuse_others(name, input_transform=None)
    if kind == "SegformerHead":
        section.refuse_others(name, interpolate_mode="bilinear")
    written = {
        **section,
        "type": section.type or UNSET,
        "norm": UNSET if norm is UNSET else norm is not None,
        "in_channels": (channels,) if isinstance(channels, int) else channels,
        "in_index": from_first(section.stated("in_index"), len(widths)),
    }
    settings: Head = SettingResolver(evidence, HEAD_CONFIGS[kind], name, written)
    settings.resolve("type", kind=HeadType, exact=kind, source="names")
    outputs, width = _shape(state, "conv_seg.weight")[:2]
    settings.exact("shapes", channels=width)
    _outputs(settings, name, outputs)
    _norm(settings, state, name)
    _inputs(settings, state, kind, name, widths)
    if kind in ("UPerHead", "PSPHead"):
        _pool_scales(settings, state)
    elif kind == "FCNHead":
        _fcn(settings, state)
    elif kind != "SegformerHead":
        _dilations(settings, state, stock=not section)
    if kind == "DepthwiseSeparableASPPHead":
        _finer_map(settings, state, name, widths)
    return settings.build()


def _outputs(settings: Head, name: str, outputs: int) -> None:
    """How many classes ``outputs`` channels of logits distinguish, and how.

    As mmsegmentation 1.2.2's ``BaseDecodeHead``: an output for each class, or one output and a
    threshold for two classes (or for one, the other being the rest).
    """
    one = outputs == 1
    classes, origin = settings.section.stated("num_classes"), "the config"
    if one and classes is UNSET and name == "decode_head":
        names = count_names(settings.evidence)
        classes, origin = (names, CHECKPOINT_META) if names in (1, 2) else (classes, origin)
    count = settings.resolve(
        "num_classes",
        config=classes,
        config_name=origin,
        default=2,
        exact=UNSET if one else outputs,
        accepts=lambda value: value in (1, 2),
        because=f"{name}.conv_seg has one output, which distinguishes two classes (num_classes=2, "
        "or 1 where the other class is the rest)"
        if one
        else f"{name}.conv_seg makes {outputs}",
    )
    settings.resolve(
        "out_channels",
        kind=int | None,
        accepts=lambda value: value == outputs or (value is None and (one or count == outputs)),
        derived=outputs,
        because=f"{name}.conv_seg makes {outputs}",
        matters=one,
    )
    settings.values["out_channels"] = None if count == outputs else 1
    threshold = settings.section.stated("threshold")
    settings.resolve(
        "threshold",
        config=threshold if one and threshold is not None else UNSET,
        default=BINARY_THRESHOLD if one else None,
        accepts=lambda value: (value is not None) == one,
        because="a head with one output needs a probability, 0 to 1"
        if one
        else f"{name} has {outputs} outputs, of which the highest wins",
        matters=one and name == "decode_head",  # an auxiliary head is for training only
    )


def _norm(settings: Head, state: Shapes, name: str) -> None:
    """Whether batch normalisation follows the convolutions, by the names beside them."""
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
    settings.resolve(
        "norm",
        exact=not bare,
        source="names",
        because=f"the weights have {'biases and no normalisation' if bare else 'BatchNorms'}",
        matters=bool(bare),
    )


def _inputs(
    settings: Head, state: Shapes, kind: HeadType, name: str, widths: Sequence[int]
) -> None:
    """Which of the backbone's outputs the head takes: ``in_index`` and ``input_transform``.

    Their channels identify them where no two outputs, or sums of several, have the same.
    """
    every = range(len(widths))
    if kind in _EACH:
        taken = [
            width
            for _, width in sorted(
                (int(key.split(".")[1]), _shape(state, key)[1])
                for key in state
                if key.startswith(_EACH[kind]) and key.endswith(".conv.weight")
            )
        ] + ([_channels_in(state)] if kind == "UPerHead" else [])
        foreign = next((width for width in taken if width not in widths), None)
        # In the order of the weights, which may be any.
        choices = [c for c in permutations(every, len(taken)) if [widths[i] for i in c] == taken]
        settings.values["input_transform"] = None
    else:
        channels = _channels_in(state)
        sets = (c for n in range(1, len(widths) + 1) for c in combinations(every, n))
        choices = [c for c in sets if sum(widths[i] for i in c) == channels]
        foreign = None if choices else channels
    if not choices:
        raise CheckpointError(
            f"{name} takes feature maps of {foreign or taken} channels, and the backbone's outputs "
            f"have {tuple(widths)}. Expected a head right behind the backbone; necks are not "
            "supported. If out_indices leaves a stage out, correct it."
        )
    written = settings.section.get("in_index")
    wanted = settings.evidence.overrides.get(f"{name}.in_index", written)
    wanted = wanted if isinstance(wanted, (list, tuple)) else ()
    wanted = sorted(index for index in wanted if isinstance(index, int))
    outputs = next((c for c in choices if sorted(c) == wanted), choices[0])
    joined = kind not in _EACH and len(outputs) > 1
    because = (
        f"{name} takes {tuple(widths[i] for i in outputs)} channels and the backbone's outputs "
        f"have {tuple(widths)}"
    )
    if kind not in _EACH:
        settings.resolve(
            "input_transform",
            # One map "joined" is that map.
            accepts=lambda value: value == "resize_concat" or not joined,
            derived="resize_concat" if joined else None,
            because=because,
            matters=joined,
        )
    index = settings.resolve(
        "in_index",
        default=outputs,
        exact=UNSET if joined or len(choices) > 1 else outputs,
        accepts=lambda value: sorted(value) == list(outputs) if joined else tuple(value) in choices,
        because=because,
        note="the weights show which outputs, not their order"
        if joined
        else "other outputs have as many channels",
    )
    settings.exact("shapes", in_channels=tuple(widths[i] for i in index))


def _channels_in(state: Shapes) -> int:
    """Channels of the one feature map the head takes, maps it joins together; UPerHead's last."""
    modules = _modules(state)
    first = next((c for c in _FIRST_CONVOLUTIONS if c.split(".")[0] in modules), "conv_seg")
    channels = _shape(state, f"{first}.weight")[1]
    # Without convs before conv_cat, the input is concatenated to itself.
    return channels // 2 if first == "conv_cat.conv" else channels


def _pool_scales(settings: Head, state: Shapes) -> None:
    count = len([key for key in state if key.startswith("psp_") and key.endswith("conv.weight")])
    settings.resolve(
        "pool_scales",
        accepts=lambda value: len(value) == count,
        because=f"the weights have {count} pooling branches",
    )


def _fcn(settings: Head, state: Shapes) -> None:
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
    settings.exact("names", num_convs=count, concat_input="conv_cat.conv.weight" in state)
    kernel = kernels.pop() if kernels else UNSET
    settings.resolve("kernel_size", exact=kernel, matters=count > 0)
    settings.resolve("dilation", matters=count > 0)


def _dilations(settings: Head, state: Shapes, *, stock: bool) -> None:
    """ASPP's dilations: a branch of dilation 1 has a 1×1 kernel, the others 3×3."""
    branches = {key: _BRANCH.match(key) for key, value in state.items() if value.ndim == 4}
    single = {int(found[1]): state[key].shape[2] == 1 for key, found in branches.items() if found}
    ones = [single[i] for i in sorted(single)]
    kernels = ", ".join("1×1" if one else "3×3" for one in ones)
    settings.resolve(
        "dilations",
        default=_STOCK_DILATIONS if stock else (1, 6, 12, 18),
        accepts=lambda value: [dilation == 1 for dilation in value] == ones,
        because=f"the weights have {len(ones)} branches of {kernels} kernels, and a branch is 1×1 "
        "where its dilation is 1",
        note="those of the stock d8 configs; d16 ones have 1, 6, 12, 18" if stock else "",
    )


def _finer_map(settings: Head, state: Shapes, name: str, widths: Sequence[int]) -> None:
    """The finer feature map of DeepLabV3+, which is the backbone's first output."""
    weight = "c1_bottleneck.conv.weight"
    out, into = _shape(state, weight)[:2] if weight in state else (0, 0)
    if into not in (0, widths[0]):
        raise CheckpointError(
            f"{name}.c1_bottleneck takes {into} channels, and the backbone's first output has "
            f"{widths[0]}. Expected them to be equal; if out_indices leaves a stage out, correct "
            "it."
        )
    settings.exact("shapes", c1_in_channels=into, c1_channels=out)


def _type_by_names(state: Shapes) -> HeadType | None:
    """The supported head whose modules these are; None if they are of no such head."""
    modules = set(_modules(state))
    if any(".depthwise_conv." in key for key in state if key.startswith("convs.")):
        return None  # DepthwiseSeparableFCNHead
    fitting = (k for k, (own, more) in _MODULES.items() if own <= modules <= own | more)
    return next(fitting, None)


def _head_type(state: Shapes, name: str, section: Section, override: str | None) -> HeadType:
    """The head's type by its names; ``override`` is the type that the user gave."""
    found, written = _type_by_names(state), section.type
    foreign = written if written not in SUPPORTED else ""
    other = "" if found else foreign or _other_head(state)
    dynamic = dynamic_names(state)
    if dynamic and not other:
        raise CheckpointError(
            f"{name}.{dynamic[0]} is an FDConv layer. Expected FDConv in the backbone only; heads "
            "with FDConv layers are not supported yet."
        )
    if found is None:
        extra = "" if other else _extra(state, name)
        if extra:
            raise CheckpointError(
                f"{name} has {extra}. Expected exactly the tensors of one of mmsegmentation's "
                f"heads; if it has parts of its own, it cannot be loaded. {_SUPPORTED}"
            )
        modules = ", ".join(_modules(state)) or "no tensors"
        raise CheckpointError(
            f"{name} is {f'a {other}' if other else 'of an unknown type'}: it has {modules}. Such "
            f"heads are not supported yet. {_SUPPORTED}"
        )
    if foreign and override is None:
        raise CheckpointError(
            f"{name} is a {written} in the config, which is not supported. {_SUPPORTED} "
            f"Its tensors are named as {found}'s: if it computes the same, set {name}.type={found}."
        )
    return found


def refuse_cascade(state: Shapes, heads: Any) -> None:
    """Refuse several decode heads in turn, by their names and the config's ``heads``."""
    tensors = part(state, "decode_head.")
    numbers = sorted({first for first in _modules(tensors) if first.isdigit()}, key=int)
    if not numbers:
        return
    sections = dict(enumerate(heads)) if isinstance(heads, (list, tuple)) else {}
    kinds = []
    for number in numbers:
        inner, section = part(tensors, f"{number}."), Section(sections.get(int(number)))
        kinds.append(section.type or _type_by_names(inner) or _other_head(inner) or "unknown head")
    raise CheckpointError(
        f"The network is a CascadeEncoderDecoder: its decode heads ({', '.join(kinds)}) work one "
        "after the other, as in PointRend or OCRNet. Expected an EncoderDecoder with one decode "
        f"head; cascades are not supported yet. {_SUPPORTED}"
    )


def _modules(state: Shapes) -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in state))


def _extra(state: Shapes, name: str) -> str:
    """What there is beside a whole supported head; empty if there is no such head."""
    modules = set(_modules(state))
    # The one with the most modules: FCNHead's own, conv_seg alone, are in every head.
    whole = [kind for kind, (needed, _) in _MODULES.items() if {"conv_seg"} < needed <= modules]
    if not whole:
        return ""
    kind = max(whole, key=lambda kind: len(_MODULES[kind][0]))
    own = set.union(*_MODULES[kind])
    found = [f"{name}.{key}" for key in state if key.split(".")[0] not in own]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"all of a {kind}, and {len(found)} tensors left over: {', '.join(found[:5])}{more}"


def _other_head(state: Shapes) -> str:
    modules = set(_modules(state))
    if modules <= {"convs", "conv_cat", "conv_seg"} and "convs" in modules:
        return "DepthwiseSeparableFCNHead" if "conv_seg" in modules else ""
    return next((kind for kind, needed in _OTHER_HEADS.items() if needed <= modules), "")
