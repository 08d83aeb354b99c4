"""A detector's neck and heads, from their names and shapes and the config's sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fdconv_deploy.checkpoints.evidence import UNSET, Evidence, stated, type_of
from fdconv_deploy.checkpoints.infer_layers import Shapes
from fdconv_deploy.config import (
    BoxCoderConfig,
    BoxHeadConfig,
    Four,
    FPNConfig,
    MaskHeadConfig,
    RoIConfig,
    RPNHeadConfig,
)
from fdconv_deploy.errors import CheckpointError

Settle = Callable[..., Any]


def infer_neck(
    state: Shapes, widths: Sequence[int], section: Mapping[str, Any], evidence: Evidence
) -> FPNConfig:
    """The feature pyramid.

    Args:
        state: the neck's tensors, names without ``neck.``; only shapes are read.
        widths: channels of each of the backbone's outputs.
        section: the config's ``model.neck``; empty if there is no config.
        evidence: takes the facts.

    Raises:
        CheckpointError: another neck, or witnesses disagree.
    """
    _expect_type("neck", section, ("FPN",))
    _refuse("neck", section, add_extra_convs=False, start_level=0, end_level=-1, norm_cfg=None)
    count = len({key.split(".")[1] for key in state if key.startswith("lateral_convs.")})
    expected = {
        f"{part}.{i}.conv.{kind}"
        for part in ("lateral_convs", "fpn_convs")
        for i in range(count)
        for kind in ("weight", "bias")
    }
    _refuse_strange("neck", state, expected, "an FPN without normalisation or extra convolutions")
    inputs = tuple(state[f"lateral_convs.{i}.conv.weight"].shape[1] for i in range(count))
    if inputs != tuple(widths):
        raise CheckpointError(
            f"The neck takes feature maps of {inputs} channels, and the backbone's outputs have "
            f"{tuple(widths)}. Expected an FPN over all of them. If out_indices is wrong, correct "
            "it."
        )
    settle = _settler("neck", section, evidence)
    return FPNConfig(
        in_channels=settle("in_channels", tuple[int, ...], exact=inputs),
        out_channels=settle(
            "out_channels", int, exact=state["lateral_convs.0.conv.weight"].shape[0]
        ),
        num_outs=settle(
            "num_outs",
            int,
            default=FPNConfig().num_outs,
            accepts=lambda value: value >= count,
            tells=f"the weights have {count} levels",
        ),
    )


def infer_rpn_head(
    state: Shapes, neck: FPNConfig, section: Mapping[str, Any], evidence: Evidence
) -> RPNHeadConfig:
    """The region proposal head and its anchors; arguments as `infer_neck`'s."""
    _expect_type("rpn_head", section, ("RPNHead",))
    expected = {f"rpn_{p}.{k}" for p in ("conv", "cls", "reg") for k in ("weight", "bias")}
    _refuse_strange("rpn_head", state, expected, "one convolution, scores and deltas")
    anchors = state["rpn_reg.weight"].shape[0] // 4
    scores = state["rpn_cls.weight"].shape[0]
    if scores != anchors:
        raise CheckpointError(
            f"rpn_head makes {scores} scores for {anchors} anchors. Expected one each, a sigmoid; "
            "softmax scores are not supported."
        )
    generator = _inner(section, "anchor_generator")
    _expect_type("rpn_head.anchor_generator", generator, ("AnchorGenerator",))
    _refuse(
        "rpn_head.anchor_generator",
        generator,
        base_sizes=None, centers=None, center_offset=0, scale_major=True,
        octave_base_scale=None, scales_per_octave=None,
    )  # fmt: skip
    settle = _settler("rpn_head", section, evidence)
    default = RPNHeadConfig()
    ratios = settle(
        "ratios",
        tuple[float, ...],
        config=stated(generator, "ratios"),
        default=default.ratios,
        accepts=lambda value: len(value) > 0 and anchors % len(value) == 0,
        tells=f"the weights have {anchors} anchors at each position",
    )
    each = anchors // len(ratios)
    scales = settle(
        "scales",
        tuple[float, ...],
        config=stated(generator, "scales"),
        default=default.scales,
        accepts=lambda value: len(value) == each,
        tells=f"{anchors} anchors with {len(ratios)} ratios need {each} scales",
    )
    strides = settle(
        "strides",
        tuple[int, ...],
        config=_single(stated(generator, "strides")),
        default=default.strides,
        accepts=lambda value: len(value) == neck.num_outs,
        tells=f"the neck has {neck.num_outs} levels",
    )
    return RPNHeadConfig(
        feat_channels=settle("feat_channels", int, exact=state["rpn_conv.weight"].shape[0]),
        scales=scales,
        ratios=ratios,
        strides=strides,
        bbox_coder=_coder("rpn_head", section, default.bbox_coder, evidence),
    )


def infer_box_head(
    state: Shapes, neck: FPNConfig, section: Mapping[str, Any], evidence: Evidence
) -> BoxHeadConfig:
    """The box head. ``section``: the config's ``model.roi_head``."""
    own = _inner(section, "bbox_head")
    _expect_type("roi_head", section, ("StandardRoIHead",))
    _expect_type("bbox_head", own, ("Shared2FCBBoxHead", "ConvFCBBoxHead", "BBoxHead"))
    _refuse("bbox_head", own, with_avg_pool=False, reg_decoded_bbox=False)
    layers = len({key.split(".")[1] for key in state if key.startswith("shared_fcs.")})
    names = ["fc_cls", "fc_reg", *(f"shared_fcs.{i}" for i in range(layers))]
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    _refuse_strange("bbox_head", state, expected, "shared linear layers, classes and deltas")
    first = "shared_fcs.0.weight" if layers else "fc_cls.weight"
    size = math.isqrt(state[first].shape[1] // neck.out_channels)
    if size * size * neck.out_channels != state[first].shape[1]:
        raise CheckpointError(
            f"bbox_head.{first} takes {state[first].shape[1]} numbers, which are no square of "
            f"the neck's {neck.out_channels} channels. Expected them from one feature pyramid."
        )
    settle = _settler("bbox_head", own, evidence)
    classes, deltas = state["fc_cls.weight"].shape[0] - 1, state["fc_reg.weight"].shape[0]
    if deltas not in (4, 4 * classes):
        raise CheckpointError(
            f"bbox_head makes {deltas} deltas for {classes} classes. Expected 4, or 4 for each."
        )
    agnostic = UNSET if classes == 1 else deltas == 4
    default = BoxHeadConfig()
    return BoxHeadConfig(
        num_classes=settle("num_classes", int, exact=classes),
        fc_out_channels=settle(
            "fc_out_channels",
            int,
            default=default.fc_out_channels,
            exact=state[first].shape[0] if layers else UNSET,
            matters=layers > 0,
        ),
        num_shared_fcs=settle("num_shared_fcs", int, exact=layers, source="names"),
        reg_class_agnostic=settle(
            "reg_class_agnostic", bool, default=False, exact=agnostic, matters=classes > 1
        ),
        bbox_coder=_coder("bbox_head", own, default.bbox_coder, evidence),
        roi=_roi(
            "bbox_head", _inner(section, "bbox_roi_extractor"), default.roi, neck, evidence, size
        ),
    )


def infer_mask_head(
    state: Shapes,
    neck: FPNConfig,
    classes: int,
    section: Mapping[str, Any],
    evidence: Evidence,
) -> MaskHeadConfig:
    """The mask head. ``classes``: of the box head; ``section``: ``model.roi_head``."""
    own = _inner(section, "mask_head")
    _expect_type("mask_head", own, ("FCNMaskHead",))
    _expect_type("mask_head.upsample_cfg", _inner(own, "upsample_cfg"), ("deconv",))
    convs = len({key.split(".")[1] for key in state if key.startswith("convs.")})
    names = ["upsample", "conv_logits", *(f"convs.{i}.conv" for i in range(convs))]
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    _refuse_strange("mask_head", state, expected, "plain convolutions and a deconvolution")
    if tuple(state["upsample.weight"].shape[2:]) != (2, 2):
        raise CheckpointError(
            f"mask_head.upsample has a kernel of {tuple(state['upsample.weight'].shape[2:])}. "
            "Expected 2×2, which doubles the mask."
        )
    masks = state["conv_logits.weight"].shape[0]
    if masks not in (1, classes):
        raise CheckpointError(
            f"mask_head makes {masks} masks for {classes} classes. Expected one, or one for each."
        )
    settle = _settler("mask_head", own, evidence)
    default = MaskHeadConfig()
    agnostic = UNSET if classes == 1 else masks == 1
    # Without an extractor of its own it takes the box head's regions.
    extractor = _inner(section, "mask_roi_extractor") or _inner(section, "bbox_roi_extractor")
    kernel = state["convs.0.conv.weight"].shape[2] if convs else UNSET
    return MaskHeadConfig(
        num_classes=settle("num_classes", int, exact=classes),
        num_convs=settle("num_convs", int, exact=convs, source="names"),
        conv_kernel_size=settle(
            "conv_kernel_size",
            int,
            default=default.conv_kernel_size,
            exact=kernel,
            matters=convs > 0,
        ),
        conv_out_channels=settle("conv_out_channels", int, exact=state["upsample.weight"].shape[1]),
        class_agnostic=settle(
            "class_agnostic", bool, default=False, exact=agnostic, matters=classes > 1
        ),
        roi=_roi("mask_head", extractor, default.roi, neck, evidence),
    )


def _roi(
    head: str,
    section: Mapping[str, Any],
    default: RoIConfig,
    neck: FPNConfig,
    evidence: Evidence,
    size: int | None = None,
) -> RoIConfig:
    """How regions are cut out. ``size``: as the weights tell, if they do."""
    layer = _inner(section, "roi_layer")
    _expect_type(f"{head}'s roi_extractor", section, ("SingleRoIExtractor",))
    _expect_type(f"{head}'s roi_layer", layer, ("RoIAlign",))
    _refuse(f"{head}'s roi_layer", layer, aligned=True, pool_mode="avg")
    settle = _settler(f"{head}.roi", section, evidence)
    return RoIConfig(
        output_size=settle(
            "output_size",
            int,
            config=_pixels(stated(layer, "output_size", "out_size")),
            default=default.output_size,
            exact=UNSET if size is None else size,
        ),
        featmap_strides=settle(
            "featmap_strides",
            tuple[int, ...],
            default=default.featmap_strides,
            accepts=lambda value: 0 < len(value) <= neck.num_outs,
            tells=f"the neck has {neck.num_outs} levels",
        ),
        finest_scale=settle("finest_scale", int, default=default.finest_scale),
        sampling_ratio=settle(
            "sampling_ratio",
            int,
            config=stated(layer, "sampling_ratio", "sample_num"),
            default=default.sampling_ratio,
            accepts=lambda value: value >= 0,
            tells="a number of samples is 0 (as many as pixels) or more",
        ),
    )


def _coder(
    head: str, section: Mapping[str, Any], default: BoxCoderConfig, evidence: Evidence
) -> BoxCoderConfig:
    coder = _inner(section, "bbox_coder")
    _expect_type(f"{head}.bbox_coder", coder, ("DeltaXYWHBBoxCoder",))
    _refuse(f"{head}.bbox_coder", coder, clip_border=True, add_ctr_clamp=False)
    settle = _settler(f"{head}.bbox_coder", coder, evidence)
    return BoxCoderConfig(
        means=settle("means", Four, config=stated(coder, "target_means"), default=default.means),
        stds=settle("stds", Four, config=stated(coder, "target_stds"), default=default.stds),
    )


def _settler(prefix: str, section: Mapping[str, Any], evidence: Evidence) -> Settle:
    def settle(field: str, kind: Any, **knowledge: Any) -> Any:
        knowledge.setdefault("config", stated(section, field))
        return evidence.settle(f"{prefix}.{field}", kind, **knowledge)

    return settle


def _inner(section: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = section.get(name)
    return value if isinstance(value, Mapping) else {}


def _single(strides: Any) -> Any:
    """Strides given as pairs of equal numbers as single ones."""
    if not isinstance(strides, (list, tuple)):
        return strides
    return tuple(s[0] if isinstance(s, (list, tuple)) and len(set(s)) == 1 else s for s in strides)


def _pixels(size: Any) -> Any:
    return size[0] if isinstance(size, (list, tuple)) and len(set(size)) == 1 else size


def _expect_type(name: str, section: Mapping[str, Any], known: Sequence[str]) -> None:
    kind = type_of(section)
    if kind and kind not in known:
        raise CheckpointError(
            f"The config's {name} is a {kind}. Expected {' or '.join(known)}; others are not "
            "supported yet."
        )


def _refuse(name: str, section: Mapping[str, Any], **expected: Any) -> None:
    """Refuse settings that change what is computed and are built one way only."""
    for field, only in expected.items():
        value = stated(section, field)
        if value is not UNSET and value != only:
            raise CheckpointError(
                f"The config's {name} has {field}={str(value)[:60]}. Expected {only!r}; anything "
                "else is not supported yet."
            )


def _refuse_strange(name: str, state: Shapes, expected: set[str], what: str) -> None:
    strange = [key for key in state if key not in expected]
    missing = sorted(expected - set(state))
    if strange or missing:
        found = f"has {name}.{strange[0]}" if strange else f"has no {name}.{missing[0]}"
        raise CheckpointError(
            f"The detector's {name} is not one known here: expected {what}, and it {found}."
        )
