"""Which of mmsegmentation's decode heads a checkpoint's names are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from fdconv_deploy.checkpoints.evidence import type_of
from fdconv_deploy.checkpoints.infer_layers import Shapes, dynamic_names, part
from fdconv_deploy.config import HeadType
from fdconv_deploy.errors import CheckpointError

SUPPORTED: tuple[HeadType, ...] = get_args(HeadType)

# Modules each head has, and those that depend on its settings. All have conv_seg.
_MODULES: dict[HeadType, tuple[set[str], set[str]]] = {
    "UPerHead": ({"psp_modules", "bottleneck", "fpn_bottleneck"}, {"lateral_convs", "fpn_convs"}),
    "FCNHead": (set(), {"convs", "conv_cat"}),
    "PSPHead": ({"psp_modules", "bottleneck"}, set()),
    "ASPPHead": ({"image_pool", "aspp_modules", "bottleneck"}, set()),
    "DepthwiseSeparableASPPHead": (
        {"image_pool", "aspp_modules", "bottleneck", "sep_bottleneck"},
        {"c1_bottleneck"},
    ),
}
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
    "Mask2FormerHead": {"pixel_decoder", "query_feat"},
    "MaskFormerHead": {"pixel_decoder", "query_embed"},
    "NLHead": {"nl_block"},
    "OCRHead": {"object_context_block"},
    "PIDHead": {"i_head", "p_head", "d_head"},
    "PSAHead": {"attention", "proj"},
    "PointHead": {"fcs", "fc_seg"},
    "SETRUPHead": {"up_convs", "norm"},
    "SETRMLAHead": {"up_convs"},
    "STDCHead": {"laplacian_kernel", "fusion_kernel"},
    "SegformerHead": {"fusion_conv"},
    "SegmenterMaskTransformerHead": {"cls_emb", "classes_proj"},
    "SideAdapterCLIPHead": {"side_adapter_network"},
}


def supported_heads() -> str:
    """The supported heads, for an error."""
    return f"Supported decode heads: {', '.join(SUPPORTED)}."


def head_by_names(state: Shapes) -> HeadType | None:
    """The supported head whose modules these are; None if they are of no such head."""
    modules = set(_modules(state))
    if any(".depthwise_conv." in key for key in state if key.startswith("convs.")):
        return None  # DepthwiseSeparableFCNHead
    for kind, (needed, possible) in _MODULES.items():
        if needed | {"conv_seg"} <= modules <= needed | possible | {"conv_seg"}:
            return kind
    return None


def head_type(
    state: Shapes, name: str, section: Mapping[str, Any], *, asked: str | None = None
) -> HeadType:
    """The head's type by its names.

    Args:
        state: the head's tensors, names without ``decode_head.``.
        name: ``decode_head`` or ``auxiliary_head``.
        section: the config's section of this head; empty if there is none.
        asked: the type that the user says it is.

    Raises:
        CheckpointError: another head, or FDConv layers in it.
    """
    found, written = head_by_names(state), type_of(section)
    other = "" if found else (written if written not in SUPPORTED else "") or _other_head(state)
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
                f"heads; if it has parts of its own, it cannot be loaded. {supported_heads()}"
            )
        modules = ", ".join(_modules(state)) or "no tensors"
        raise CheckpointError(
            f"{name} is {f'a {other}' if other else 'of an unknown type'}: it has {modules}. Such "
            f"heads are not supported yet. {supported_heads()}"
        )
    if written and written not in SUPPORTED and asked is None:
        raise CheckpointError(
            f"{name} is a {written} in the config, which is not supported. {supported_heads()} "
            f"Its tensors are named as {found}'s: if it computes the same, set {name}.type={found}."
        )
    return found


def refuse_cascade(state: Shapes, heads: Any) -> None:
    """Refuse decode heads that work one after the other, by their names.

    Args:
        state: the whole network's tensors.
        heads: the config's ``model.decode_head``, or anything else.

    Raises:
        CheckpointError: there are several decode heads.
    """
    tensors = part(state, "decode_head.")
    numbers = sorted({first for first in _modules(tensors) if first.isdigit()}, key=int)
    if not numbers:
        return
    sections: Sequence[Any] = heads if isinstance(heads, (list, tuple)) else ()
    kinds = []
    for number in numbers:
        section = sections[int(number)] if int(number) < len(sections) else {}
        inner = part(tensors, f"{number}.")
        written = type_of(section) if isinstance(section, Mapping) else ""
        kinds.append(written or head_by_names(inner) or _other_head(inner) or "unknown head")
    raise CheckpointError(
        f"The network is a CascadeEncoderDecoder: its decode heads ({', '.join(kinds)}) work one "
        "after the other, as in PointRend or OCRNet. Expected an EncoderDecoder with one decode "
        f"head; cascades are not supported yet. {supported_heads()}"
    )


def _modules(state: Shapes) -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in state))


def _extra(state: Shapes, name: str) -> str:
    """What there is beside a whole supported head; empty if there is no such head."""
    modules = _modules(state)
    # The one with the most modules: FCNHead's own, none but conv_seg, are in every head.
    for kind, (needed, possible) in sorted(_MODULES.items(), key=lambda item: -len(item[1][0])):
        if needed and needed | {"conv_seg"} <= set(modules):
            own = needed | possible | {"conv_seg"}
            found = [f"{name}.{key}" for key in state if key.split(".")[0] not in own]
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            shown = f"{', '.join(found[:5])}{more}"
            return f"all of a {kind}, and {len(found)} tensors left over: {shown}"
    return ""


def _other_head(state: Shapes) -> str:
    modules = set(_modules(state))
    if modules <= {"convs", "conv_cat", "conv_seg"} and "convs" in modules:
        return "DepthwiseSeparableFCNHead" if "conv_seg" in modules else ""
    return next((kind for kind, needed in _OTHER_HEADS.items() if needed <= modules), "")
