"""A network's configuration, from its state dict and what was written beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fdconv_deploy.checkpoints.config_parser import UNSET, Config
from fdconv_deploy.checkpoints.config_writer import (
    CONFIG_ENTRIES,
    DETECTOR_SECTIONS,
    DETECTOR_TYPES,
)
from fdconv_deploy.checkpoints.infer_backbone import infer_backbone
from fdconv_deploy.checkpoints.infer_classes_and_preprocessing import (
    infer_classes,
    infer_preprocessing,
    infer_test_mode,
)
from fdconv_deploy.checkpoints.infer_head import infer_head, refuse_cascade, stock_backbone
from fdconv_deploy.checkpoints.infer_query_head import (
    infer_panoptic,
    infer_query_head,
    query_head_type,
)
from fdconv_deploy.checkpoints.settings import ConfigT, Evidence, Inference, SettingResolver
from fdconv_deploy.checkpoints.state_dict import (
    Shapes,
    backbone_prefix,
    dynamic_names,
    framework_of,
    in_openmmlab_names,
    kind_of,
    part,
)
from fdconv_deploy.config import (
    PUBLISHED_SCALE,
    SIZE_DIVISOR,
    BoxCoderConfig,
    BoxHeadConfig,
    DetectorConfig,
    DetectorTestConfig,
    FPNConfig,
    HeadConfig,
    MaskHeadConfig,
    QueryHeadConfig,
    RCNNTestConfig,
    RoIConfig,
    RPNHeadConfig,
    RPNTestConfig,
    SegmentorConfig,
)
from fdconv_deploy.errors import CheckpointError

_NEEDED = ("backbone.", "neck.lateral_convs.", "rpn_head.rpn_conv.", "roi_head.bbox_head.fc_cls.")
_MODELS = ("FasterRCNN", "MaskRCNN", "TwoStageDetector")
_NOT_WHOLE = {
    "backbone": (
        "it is a backbone without a decode head. It can be inspected; to export, give the whole "
        "segmentation checkpoint"
    ),
    "classifier": (
        "it is a classifier. It can be inspected; to export, give a segmentation checkpoint"
    ),
    "unknown": (
        "none of its names is of a network known here, such as backbone.layer1.0.conv1.weight"
    ),
}


def infer_config(
    state: Shapes,
    *,
    config: Config | None = None,
    meta: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> Inference[Any]:
    """The configuration of the segmentor, the detector or the backbone that these tensors are.

    What names and shapes leave open comes from ``overrides``, else from the config, else it is
    the published default and listed under ``assumed``.

    Args:
        state: names of any framework → tensors. Only shapes are read, so tensors on the meta
            device do.
        config: the config, from the checkpoint or the user.
        meta: the checkpoint's meta data, for class names and palette.
        overrides: values of the user's: dotted field names (``"backbone.style"``), or nested
            dicts.
        whole: refuse a backbone alone and a classifier.

    Raises:
        CheckpointError: not a network known here, or the config or the user contradicts the
            weights.
    """
    evidence = Evidence(overrides, config, meta, framework_of(state))
    state = in_openmmlab_names(state)
    kind = kind_of(state)
    if kind == "detector":
        return evidence.inference(_detector(state, evidence))
    if kind == "segmentor":
        return evidence.inference(_segmentor(state, evidence))
    if kind == "unknown" or whole:
        names = ", ".join(list(state)[:3]) or "none"
        raise CheckpointError(
            "Expected a segmentation checkpoint (names under backbone. and decode_head.); "
            f"{_NOT_WHOLE[kind]}. Its first names: {names}."
        )
    return evidence.inference(infer_backbone(part(state, backbone_prefix(state)), evidence))


def _segmentor(state: Shapes, evidence: Evidence) -> SegmentorConfig:
    _check_model(state, evidence.config)
    backbone = infer_backbone(part(state, "backbone."), evidence, stock_backbone(state))
    widths, tensors = backbone.output_widths, part(state, "decode_head.")
    kind = query_head_type(tensors)
    head: HeadConfig = (
        infer_head(state, "decode_head", widths, evidence)
        if kind is None
        else infer_query_head(tensors, kind, widths, evidence)
    )
    auxiliary = _auxiliary(state, widths, evidence)
    settings = SettingResolver(evidence, SegmentorConfig, "", {})
    # The labels 0 and 1 of one output: a dataset names both, or 1 alone.
    infer_classes(settings, {head.num_classes} if head.label_threshold is None else {1, 2})
    if head.label_threshold is not None:
        evidence.notes.append(_binary_note(settings.values["classes"], head.label_threshold))
    queries = isinstance(head, QueryHeadConfig)
    return settings.build(
        backbone=backbone,
        decode_head=head,
        auxiliary_head=auxiliary,
        test=infer_test_mode(evidence),
        preprocessing=infer_preprocessing(
            evidence,
            channels=backbone.in_channels,
            size_divisor=SIZE_DIVISOR if queries else None,
        ),
        panoptic=infer_panoptic(evidence, head.num_classes) if queries else None,
    )


def _auxiliary(state: Shapes, widths: tuple[int, ...], evidence: Evidence) -> HeadConfig | None:
    """The auxiliary head, which only training needs: one not known here is left out."""
    tensors = part(state, "auxiliary_head.")
    if not tensors:
        return None
    if all(key.split(".")[0].isdigit() for key in tensors):
        evidence.notes.append("There are several auxiliary heads; they are left out.")
        return None
    known = len(evidence.settings)
    try:
        return infer_head(state, "auxiliary_head", widths, evidence)
    except CheckpointError as error:
        if any(name.startswith("auxiliary_head.") for name in evidence.overrides):
            raise
        del evidence.settings[known:]
        evidence.notes.append(f"The auxiliary head is left out. {error}")
        return None


def _binary_note(classes: tuple[str, ...], threshold: float) -> str:
    """What the labels of a head with one output mean."""
    positive = classes[-1] if classes else "class 1"
    rest = classes[0] if len(classes) == 2 else "the rest"
    return (
        f"The decode head has one output: a pixel is {positive!r} (label 1) where its sigmoid is "
        f"above decode_head.threshold, {threshold:g}, and {rest!r} (label 0) elsewhere."
    )


def _check_model(state: Shapes, config: Config) -> None:
    refuse_cascade(state, config.section("model").get("decode_head"))
    config.section("model").refuse_others("model", "EncoderDecoder", "Mask2Former")
    necks = [key for key in state if key.startswith("neck.")]
    if necks:
        raise CheckpointError(
            f"The network has a neck ({necks[0]}). Expected a decode head right behind the "
            "backbone; necks are not supported yet."
        )


# Two-stage detectors


def _detector(state: Shapes, evidence: Evidence) -> DetectorConfig:
    """A two-stage detector, under the names of mmdetection 2.x and 3.x."""
    _check_kind(state, evidence.config)
    # Modes are of segmentation networks; a detector does what they call whole.
    mode = evidence.overrides.pop("test.mode", "whole")
    if mode != "whole":
        raise CheckpointError(
            f"it is a detector, which takes the whole image; mode {mode!r} is of segmentation "
            "networks. Leave the mode out."
        )
    backbone = infer_backbone(part(state, "backbone."), evidence)
    if backbone.in_channels != 3:
        raise CheckpointError(
            f"it is a detector whose images have {backbone.in_channels} bands. Expected 3: "
            "detectors of other images are not supported."
        )
    evidence.config = _checked(evidence.config)
    neck = _neck(part(state, "neck."), backbone.output_widths, evidence)
    rpn_head = _rpn_head(part(state, "rpn_head."), neck, evidence)
    bbox_head = _box_head(part(state, "roi_head.bbox_head."), neck, evidence)
    classes, tensors = bbox_head.num_classes, part(state, "roi_head.mask_head.")
    mask_head = _mask_head(tensors, neck, classes, evidence) if tensors else None
    rcnn = _resolver(evidence, "test.rcnn", RCNNTestConfig)
    rcnn.resolve("mask_thr_binary", matters=mask_head is not None)
    settings = SettingResolver(evidence, DetectorConfig, "", {})
    infer_classes(settings, {classes}, "box head")
    return settings.build(
        backbone=backbone,
        neck=neck,
        rpn_head=rpn_head,
        bbox_head=bbox_head,
        mask_head=mask_head,
        test=DetectorTestConfig(
            rpn=_resolver(evidence, "test.rpn", RPNTestConfig).build(), rcnn=rcnn.build()
        ),
        # A graph's input is padded to multiples of 32, as published.
        preprocessing=infer_preprocessing(evidence, scale=PUBLISHED_SCALE, harmless=("Pad",)),
    )


def _check_kind(state: Shapes, config: Config) -> None:
    """Refuse any detector but Faster R-CNN and Mask R-CNN over a feature pyramid."""
    kind = config.section("model").type
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


def _checked(config: Config) -> Config:
    """The config, none of it unsupported, with ``test_cfg`` of both stages in its ``model``."""
    rpn, rcnn = (
        config.section("model", "test_cfg", stage) or config.section("test_cfg", stage)
        for stage in ("rpn", "rcnn")
    )
    rcnn = rcnn or config.section("model", "roi_head", "test_cfg")
    roi_head = config.section("model", "roi_head")
    # Without an extractor of its own, the mask head takes the box head's regions.
    extractor = roi_head.get("mask_roi_extractor") or roi_head.get("bbox_roi_extractor")
    own = {
        "test_cfg": {"rpn": rpn, "rcnn": rcnn},
        "roi_head": roi_head | {"mask_roi_extractor": extractor},
    }
    checked = Config(config.values | {"model": config.section("model") | own}, config.notes)
    for path, (types, only) in DETECTOR_TYPES.items():
        checked.section("model", *path.split(".")).refuse_others(path, *types, **only)
    return checked


def _resolver(
    evidence: Evidence, name: str, kind: type[ConfigT], default: ConfigT | None = None
) -> SettingResolver[ConfigT]:
    """The resolver of the part ``name``, whose published defaults may be its owner's."""
    section = evidence.config.section("model", *DETECTOR_SECTIONS[name].split("."))
    entries = {field: (field,) for field in kind.model_fields} | CONFIG_ENTRIES.get(kind, {})
    written = {field: section.stated(*names) for field, names in entries.items()}
    if kind is RoIConfig:
        written["output_size"] = _pixels(written["output_size"])
    if isinstance(written.get("strides"), (list, tuple)):
        written["strides"] = tuple(map(_pixels, written["strides"]))
    defaults = default.model_dump() if default else {}
    return SettingResolver(evidence, kind, name, written, defaults=defaults)


def _roi(
    evidence: Evidence, head: str, default: RoIConfig, neck: FPNConfig, size: Any
) -> RoIConfig:
    """How regions are cut out, ``size`` pixels a side if weights show it."""
    settings = _resolver(evidence, f"{head}.roi", RoIConfig, default)
    settings.exact("shapes", output_size=size)
    settings.resolve(
        "featmap_strides",
        accepts=lambda value: 0 < len(value) <= neck.num_outs,
        because=f"the neck has {neck.num_outs} levels",
    )
    return settings.build()


def _neck(state: Shapes, widths: Sequence[int], evidence: Evidence) -> FPNConfig:
    """The feature pyramid over outputs of ``widths`` channels."""
    count = _count(state, "lateral_convs.")
    convs = [f"{name}.{i}.conv" for name in ("lateral_convs", "fpn_convs") for i in range(count)]
    _refuse_strange("neck", state, convs, "an FPN without normalisation or extra convolutions")
    inputs = tuple(state[f"lateral_convs.{i}.conv.weight"].shape[1] for i in range(count))
    if inputs != tuple(widths):
        raise CheckpointError(
            f"The neck takes feature maps of {inputs} channels, and the backbone's outputs have "
            f"{tuple(widths)}. Expected an FPN over all of them. If out_indices is wrong, correct "
            "it."
        )
    settings = _resolver(evidence, "neck", FPNConfig)
    outputs = state["lateral_convs.0.conv.weight"].shape[0]
    settings.exact("shapes", in_channels=inputs, out_channels=outputs)
    settings.resolve(
        "num_outs", accepts=lambda value: value >= count, because=f"the weights have {count} levels"
    )
    return settings.build()


def _rpn_head(state: Shapes, neck: FPNConfig, evidence: Evidence) -> RPNHeadConfig:
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
    settings = _resolver(evidence, "rpn_head", RPNHeadConfig)
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
    coder = _resolver(evidence, "rpn_head.bbox_coder", BoxCoderConfig).build()
    return settings.build(bbox_coder=coder)


def _box_head(state: Shapes, neck: FPNConfig, evidence: Evidence) -> BoxHeadConfig:
    layers = _count(state, "shared_fcs.")
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
    settings = _resolver(evidence, "bbox_head", BoxHeadConfig)
    settings.exact("shapes", num_classes=classes)
    width = state[first].shape[0] if layers else UNSET
    settings.resolve("fc_out_channels", exact=width, matters=layers > 0)
    settings.exact("names", num_shared_fcs=layers)
    agnostic = UNSET if classes == 1 else deltas == 4
    settings.resolve("reg_class_agnostic", exact=agnostic, matters=classes > 1)
    default = BoxHeadConfig().bbox_coder
    coder = _resolver(evidence, "bbox_head.bbox_coder", BoxCoderConfig, default).build()
    return settings.build(
        bbox_coder=coder, roi=_roi(evidence, "bbox_head", RoIConfig(), neck, size)
    )


def _mask_head(state: Shapes, neck: FPNConfig, classes: int, evidence: Evidence) -> MaskHeadConfig:
    convs = _count(state, "convs.")
    names = ["upsample", "conv_logits", *(f"convs.{i}.conv" for i in range(convs))]
    _refuse_strange("mask_head", state, names, "plain convolutions and a deconvolution")
    upsample = tuple(state["upsample.weight"].shape)
    if upsample[2:] != (2, 2):
        raise CheckpointError(
            f"mask_head.upsample has a kernel of {upsample[2:]}. Expected 2×2, which doubles the "
            "mask."
        )
    masks = state["conv_logits.weight"].shape[0]
    if masks not in (1, classes):
        raise CheckpointError(
            f"mask_head makes {masks} masks for {classes} classes. Expected one, or one for each."
        )
    settings = _resolver(evidence, "mask_head", MaskHeadConfig)
    settings.exact("shapes", num_classes=classes, conv_out_channels=upsample[1])
    settings.exact("names", num_convs=convs)
    kernel = state["convs.0.conv.weight"].shape[2] if convs else UNSET
    settings.resolve("conv_kernel_size", exact=kernel, matters=convs > 0)
    agnostic = UNSET if classes == 1 else masks == 1
    settings.resolve("class_agnostic", exact=agnostic, matters=classes > 1)
    return settings.build(roi=_roi(evidence, "mask_head", MaskHeadConfig().roi, neck, UNSET))


def _count(state: Shapes, prefix: str) -> int:
    """How many numbered layers there are under ``prefix``."""
    return len({key.split(".")[1] for key in state if key.startswith(prefix)})


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
