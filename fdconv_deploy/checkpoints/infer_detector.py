"""A two-stage detector's configuration, from its state dict and what was written beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.evidence import (
    UNSET,
    Evidence,
    Inference,
    SettingResolver,
    expect_type,
    refuse_settings,
    stated,
    type_of,
)
from fdconv_deploy.checkpoints.infer_backbone import infer_backbone
from fdconv_deploy.checkpoints.infer_classes import infer_classes
from fdconv_deploy.checkpoints.infer_layers import Shapes, dynamic_names, part
from fdconv_deploy.checkpoints.infer_preprocessing import infer_preprocessing
from fdconv_deploy.config import (
    PUBLISHED_SCALE,
    BoxCoderConfig,
    BoxHeadConfig,
    DetectorConfig,
    DetectorTestConfig,
    FPNConfig,
    MaskHeadConfig,
    RCNNTestConfig,
    RoIConfig,
    RPNHeadConfig,
    RPNTestConfig,
)
from fdconv_deploy.errors import CheckpointError

_NEEDED = ("backbone.", "neck.lateral_convs.", "rpn_head.rpn_conv.", "roi_head.bbox_head.fc_cls.")
_MODELS = ("FasterRCNN", "MaskRCNN", "TwoStageDetector")


def infer_detector_config(
    state: Shapes,
    *,
    config: Config | None = None,
    meta: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Inference[DetectorConfig]:
    """Infer a two-stage detector's configuration; see :func:`infer_segmentor_config`.

    Args:
        state: names → tensors as in mmdetection 2.x and 3.x. Only shapes are read.
        config: the config, from the checkpoint or the user.
        meta: the checkpoint's meta data, for class names and palette.
        overrides: values of the user's, by dotted names of :class:`DetectorConfig`'s fields.

    Raises:
        CheckpointError: not a detector known here, or the config or the user contradicts the
            weights.
    """
    config = config or Config()
    _check_kind(state, config)
    evidence = Evidence(_without_mode(overrides or {}), config.notes)
    backbone = infer_backbone(part(state, "backbone."), config, evidence)
    if backbone.in_channels != 3:
        raise CheckpointError(
            f"it is a detector whose images have {backbone.in_channels} bands. Expected 3: "
            "detectors of other images are not supported."
        )
    model, widths = config.section("model"), backbone.output_widths
    neck = _neck(part(state, "neck."), widths, _inner(model, "neck"), evidence)
    rpn_head = _rpn_head(part(state, "rpn_head."), neck, _inner(model, "rpn_head"), evidence)
    section = _inner(model, "roi_head")
    bbox_head = _box_head(part(state, "roi_head.bbox_head."), neck, section, evidence)
    classes, tensors = bbox_head.num_classes, part(state, "roi_head.mask_head.")
    mask_head = _mask_head(tensors, neck, classes, section, evidence) if tensors else None
    settings = SettingResolver(evidence, DetectorConfig, "", {})
    infer_classes(settings, {classes}, config, meta or {}, head="box head")
    architecture = settings.build(
        backbone=backbone,
        neck=neck,
        rpn_head=rpn_head,
        bbox_head=bbox_head,
        mask_head=mask_head,
        test=_test(config, evidence, masks=mask_head is not None),
        # A graph's input is padded to multiples of 32, as published.
        preprocessing=infer_preprocessing(
            config, evidence, scale=PUBLISHED_SCALE, harmless=("Pad",)
        ),
    )
    return evidence.inference(architecture)


def _without_mode(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Modes are of segmentation networks; a detector does what they call whole."""
    if overrides.get("test.mode", "whole") != "whole":
        raise CheckpointError(
            f"it is a detector, which takes the whole image; mode {overrides['test.mode']!r} is of "
            "segmentation networks. Leave the mode out."
        )
    return {name: value for name, value in overrides.items() if name != "test.mode"}


def _check_kind(state: Shapes, config: Config) -> None:
    """Refuse any detector but Faster R-CNN and Mask R-CNN over a feature pyramid."""
    kind = type_of(config.section("model"))
    missing = [name for name in _NEEDED if not any(key.startswith(name) for key in state)]
    known = (*_NEEDED[:2], "rpn_head.", "roi_head.bbox_head.", "roi_head.mask_head.")
    strange = [key for key in state if not key.startswith((*known, "neck."))]
    if missing or strange or (kind and kind not in _MODELS):
        found = f"has {strange[0]}" if strange else f"has no {missing[0]}…" if missing else ""
        found = found or f"is a {kind} by its config"
        raise CheckpointError(
            "it is a detector, but not one known here: expected mmdetection's Faster R-CNN or Mask "
            f"R-CNN over a feature pyramid, and it {found}. Its backbone can be used in one: the "
            "keys under `backbone.` are the same."
        )
    masks = any(key.startswith("roi_head.mask_head.") for key in state)
    if (kind == "MaskRCNN" and not masks) or (kind == "FasterRCNN" and masks):
        raise CheckpointError(
            f"The config's model is a {kind}, and the weights have {'a' if masks else 'no'} mask "
            "head. Give the config they were trained with."
        )
    outside = [name for name in dynamic_names(state) if not name.startswith("backbone.")]
    if outside:
        raise CheckpointError(
            f"{outside[0]} is an FDConv layer. Expected FDConv in the backbone only; detectors' "
            "heads with FDConv layers are not supported yet."
        )


def _neck(
    state: Shapes, widths: Sequence[int], section: Mapping[str, Any], evidence: Evidence
) -> FPNConfig:
    """The feature pyramid over outputs of ``widths`` channels."""
    expect_type("neck", section, "FPN")
    refuse_settings(
        "neck", section, add_extra_convs=False, start_level=0, end_level=-1, norm_cfg=None
    )
    count = len({key.split(".")[1] for key in state if key.startswith("lateral_convs.")})
    convs = [f"{name}.{i}.conv" for name in ("lateral_convs", "fpn_convs") for i in range(count)]
    _refuse_strange("neck", state, convs, "an FPN without normalisation or extra convolutions")
    inputs = tuple(state[f"lateral_convs.{i}.conv.weight"].shape[1] for i in range(count))
    if inputs != tuple(widths):
        raise CheckpointError(
            f"The neck takes feature maps of {inputs} channels, and the backbone's outputs have "
            f"{tuple(widths)}. Expected an FPN over all of them. If out_indices is wrong, correct "
            "it."
        )
    settings = SettingResolver(evidence, FPNConfig, "neck", section)
    outputs = state["lateral_convs.0.conv.weight"].shape[0]
    settings.exact("shapes", in_channels=inputs, out_channels=outputs)
    settings.resolve(
        "num_outs", accepts=lambda value: value >= count, because=f"the weights have {count} levels"
    )
    return settings.build()


def _rpn_head(
    state: Shapes, neck: FPNConfig, section: Mapping[str, Any], evidence: Evidence
) -> RPNHeadConfig:
    """The region proposal head and its anchors."""
    expect_type("rpn_head", section, "RPNHead")
    _refuse_strange(
        "rpn_head", state, ["rpn_conv", "rpn_cls", "rpn_reg"], "one convolution, scores and deltas"
    )
    anchors = state["rpn_reg.weight"].shape[0] // 4
    scores = state["rpn_cls.weight"].shape[0]
    if scores != anchors:
        raise CheckpointError(
            f"rpn_head makes {scores} scores for {anchors} anchors. Expected one each, a sigmoid; "
            "softmax scores are not supported."
        )
    generator = _inner(section, "anchor_generator")
    expect_type("rpn_head.anchor_generator", generator, "AnchorGenerator")
    refuse_settings(
        "rpn_head.anchor_generator",
        generator,
        base_sizes=None, centers=None, center_offset=0, scale_major=True,
        octave_base_scale=None, scales_per_octave=None,
    )  # fmt: skip
    written = {**section, **generator, "strides": _single(stated(generator, "strides"))}
    settings = SettingResolver(evidence, RPNHeadConfig, "rpn_head", written)
    ratios = settings.resolve(
        "ratios",
        accepts=lambda value: len(value) > 0 and anchors % len(value) == 0,
        because=f"the weights have {anchors} anchors at each position",
    )
    each = anchors // len(ratios)
    settings.resolve(
        "scales",
        accepts=lambda value: len(value) == each,
        because=f"{anchors} anchors with {len(ratios)} ratios need {each} scales",
    )
    settings.resolve(
        "strides",
        accepts=lambda value: len(value) == neck.num_outs,
        because=f"the neck has {neck.num_outs} levels",
    )
    settings.exact("shapes", feat_channels=state["rpn_conv.weight"].shape[0])
    return settings.build(bbox_coder=_coder("rpn_head", section, BoxCoderConfig(), evidence))


def _box_head(
    state: Shapes, neck: FPNConfig, section: Mapping[str, Any], evidence: Evidence
) -> BoxHeadConfig:
    """The box head. ``section``: the config's ``model.roi_head``."""
    own = _inner(section, "bbox_head")
    expect_type("roi_head", section, "StandardRoIHead")
    expect_type("bbox_head", own, "Shared2FCBBoxHead", "ConvFCBBoxHead", "BBoxHead")
    refuse_settings("bbox_head", own, with_avg_pool=False, reg_decoded_bbox=False)
    layers = len({key.split(".")[1] for key in state if key.startswith("shared_fcs.")})
    names = ["fc_cls", "fc_reg", *(f"shared_fcs.{i}" for i in range(layers))]
    _refuse_strange("bbox_head", state, names, "shared linear layers, classes and deltas")
    first = "shared_fcs.0.weight" if layers else "fc_cls.weight"
    size = math.isqrt(state[first].shape[1] // neck.out_channels)
    if size * size * neck.out_channels != state[first].shape[1]:
        raise CheckpointError(
            f"bbox_head.{first} takes {state[first].shape[1]} numbers, which are no square of "
            f"the neck's {neck.out_channels} channels. Expected them from one feature pyramid."
        )
    classes, deltas = state["fc_cls.weight"].shape[0] - 1, state["fc_reg.weight"].shape[0]
    if deltas not in (4, 4 * classes):
        raise CheckpointError(
            f"bbox_head makes {deltas} deltas for {classes} classes. Expected 4, or 4 for each."
        )
    settings = SettingResolver(evidence, BoxHeadConfig, "bbox_head", own)
    settings.exact("shapes", num_classes=classes)
    width = state[first].shape[0] if layers else UNSET
    settings.resolve("fc_out_channels", exact=width, matters=layers > 0)
    settings.exact("names", num_shared_fcs=layers)
    agnostic = UNSET if classes == 1 else deltas == 4
    settings.resolve("reg_class_agnostic", exact=agnostic, matters=classes > 1)
    default, extractor = BoxHeadConfig(), _inner(section, "bbox_roi_extractor")
    return settings.build(
        bbox_coder=_coder("bbox_head", own, default.bbox_coder, evidence),
        roi=_roi("bbox_head", extractor, default.roi, neck, evidence, size),
    )


def _mask_head(
    state: Shapes, neck: FPNConfig, classes: int, section: Mapping[str, Any], evidence: Evidence
) -> MaskHeadConfig:
    """The mask head. ``classes``: of the box head; ``section``: ``model.roi_head``."""
    own = _inner(section, "mask_head")
    expect_type("mask_head", own, "FCNMaskHead")
    expect_type("mask_head.upsample_cfg", _inner(own, "upsample_cfg"), "deconv")
    convs = len({key.split(".")[1] for key in state if key.startswith("convs.")})
    names = ["upsample", "conv_logits", *(f"convs.{i}.conv" for i in range(convs))]
    _refuse_strange("mask_head", state, names, "plain convolutions and a deconvolution")
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
    settings = SettingResolver(evidence, MaskHeadConfig, "mask_head", own)
    settings.exact("shapes", num_classes=classes)
    settings.exact("names", num_convs=convs)
    kernel = state["convs.0.conv.weight"].shape[2] if convs else UNSET
    settings.resolve("conv_kernel_size", exact=kernel, matters=convs > 0)
    settings.exact("shapes", conv_out_channels=state["upsample.weight"].shape[1])
    agnostic = UNSET if classes == 1 else masks == 1
    settings.resolve("class_agnostic", exact=agnostic, matters=classes > 1)
    # Without an extractor of its own it takes the box head's regions.
    extractor = _inner(section, "mask_roi_extractor") or _inner(section, "bbox_roi_extractor")
    roi = _roi("mask_head", extractor, MaskHeadConfig().roi, neck, evidence, UNSET)
    return settings.build(roi=roi)


def _roi(
    head: str,
    section: Mapping[str, Any],
    default: RoIConfig,
    neck: FPNConfig,
    evidence: Evidence,
    size: Any,
) -> RoIConfig:
    """How regions are cut out. ``size``: ``output_size``, UNSET where weights don't show it."""
    layer = _inner(section, "roi_layer")
    expect_type(f"{head}'s roi_extractor", section, "SingleRoIExtractor")
    expect_type(f"{head}'s roi_layer", layer, "RoIAlign")
    refuse_settings(f"{head}'s roi_layer", layer, aligned=True, pool_mode="avg")
    written = {
        **section,
        "output_size": _pixels(stated(layer, "output_size", "out_size")),
        "sampling_ratio": stated(layer, "sampling_ratio", "sample_num"),
    }
    settings = SettingResolver(
        evidence, RoIConfig, f"{head}.roi", written, defaults=default.model_dump()
    )
    settings.exact("shapes", output_size=size)
    settings.resolve(
        "featmap_strides",
        accepts=lambda value: 0 < len(value) <= neck.num_outs,
        because=f"the neck has {neck.num_outs} levels",
    )
    return settings.build()


def _coder(
    head: str, section: Mapping[str, Any], default: BoxCoderConfig, evidence: Evidence
) -> BoxCoderConfig:
    coder = _inner(section, "bbox_coder")
    expect_type(f"{head}.bbox_coder", coder, "DeltaXYWHBBoxCoder")
    refuse_settings(f"{head}.bbox_coder", coder, clip_border=True, add_ctr_clamp=False)
    written = {"means": stated(coder, "target_means"), "stds": stated(coder, "target_stds")}
    return SettingResolver(
        evidence, BoxCoderConfig, f"{head}.bbox_coder", written, defaults=default.model_dump()
    ).build()


def _test(config: Config, evidence: Evidence, *, masks: bool) -> DetectorTestConfig:
    """``test_cfg`` of both stages: of the model, the RoI head or, in older files, the config."""
    rpn = config.section("model", "test_cfg", "rpn") or config.section("test_cfg", "rpn")
    rcnn = (
        config.section("model", "test_cfg", "rcnn")
        or config.section("test_cfg", "rcnn")
        or config.section("model", "roi_head", "test_cfg")
    )
    refuse_settings("test_cfg.rpn", rpn, nms_across_levels=False)
    kept = {"max_per_img": stated(rpn, "max_per_img", "max_num", "nms_post")}
    first = SettingResolver(
        evidence, RPNTestConfig, "test.rpn", rpn | kept | _suppression("rpn", rpn)
    ).build()
    second = SettingResolver(
        evidence, RCNNTestConfig, "test.rcnn", rcnn | _suppression("rcnn", rcnn)
    )
    second.resolve("mask_thr_binary", matters=masks)
    return DetectorTestConfig(rpn=first, rcnn=second.build())


def _suppression(stage: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """The threshold of the ``nms`` entry, which must be plain suppression, group by group."""
    nms = _inner(section, "nms")
    expect_type(f"test_cfg.{stage}.nms", nms, "nms")
    refuse_settings(f"test_cfg.{stage}.nms", nms, class_agnostic=False)
    value = stated(nms, "iou_threshold", "iou_thr")
    return {"nms_iou_threshold": stated(section, "nms_thr") if value is UNSET else value}


def _inner(section: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = section.get(name)
    return value if isinstance(value, Mapping) else {}


def _single(strides: Any) -> Any:
    """Strides given as pairs of equal numbers as single ones."""
    if not isinstance(strides, (list, tuple)):
        return strides
    return tuple(_pixels(stride) for stride in strides)


def _pixels(size: Any) -> Any:
    """The one number of several equal ones."""
    several = isinstance(size, (list, tuple)) and len(size) > 0
    return size[0] if several and all(side == size[0] for side in size) else size


def _refuse_strange(name: str, state: Shapes, layers: Sequence[str], what: str) -> None:
    """Refuse other tensors than each layer's weight and bias."""
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    strange = [key for key in state if key not in expected]
    missing = sorted(expected - set(state))
    if strange or missing:
        found = f"has {name}.{strange[0]}" if strange else f"has no {name}.{missing[0]}"
        raise CheckpointError(
            f"The detector's {name} is not one known here: expected {what}, and it {found}."
        )
