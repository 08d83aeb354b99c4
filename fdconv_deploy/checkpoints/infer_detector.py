"""A state dict and what was written beside it → the architecture of its detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.evidence import Evidence, Inference, type_of
from fdconv_deploy.checkpoints.infer_detector_heads import (
    infer_box_head,
    infer_mask_head,
    infer_neck,
    infer_rpn_head,
)
from fdconv_deploy.checkpoints.infer_detector_test import infer_rcnn_test, infer_rpn_test
from fdconv_deploy.checkpoints.infer_layers import Shapes, dynamic_names, part
from fdconv_deploy.checkpoints.infer_preprocessing import infer_classes, infer_preprocessing
from fdconv_deploy.checkpoints.infer_segmentor import infer_whole_backbone, output_widths
from fdconv_deploy.config import PUBLISHED_SCALE, DetectorConfig, DetectorTestConfig
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
    """Tell a two-stage detector's architecture; arguments as :func:`infer_segmentor_config`'s.

    Args:
        state: names → tensors as in mmdetection 2.x and 3.x. Only shapes are read.
        config: the config, from the checkpoint or the user.
        meta: the checkpoint's meta data, for class names and palette.
        overrides: what the user says: dotted names of :class:`DetectorConfig`'s fields.

    Raises:
        CheckpointError: not a detector known here, or witnesses contradict.
    """
    config = config or Config()
    _check_kind(state, config)
    evidence = Evidence(_without_mode(overrides or {}))
    evidence.notes.extend(config.notes)
    backbone = infer_whole_backbone(part(state, "backbone."), config, evidence)
    if backbone.in_channels != 3:
        raise CheckpointError(
            f"it is a detector whose images have {backbone.in_channels} bands. Expected 3: "
            "detectors of other images are not supported."
        )
    widths = output_widths(backbone, part(state, "backbone."))
    neck = infer_neck(part(state, "neck."), widths, config.section("model", "neck"), evidence)
    rpn_head = infer_rpn_head(
        part(state, "rpn_head."), neck, config.section("model", "rpn_head"), evidence
    )
    section = config.section("model", "roi_head")
    bbox_head = infer_box_head(part(state, "roi_head.bbox_head."), neck, section, evidence)
    tensors = part(state, "roi_head.mask_head.")
    classes = bbox_head.num_classes
    mask_head = infer_mask_head(tensors, neck, classes, section, evidence) if tensors else None
    names, palette = infer_classes({classes}, config, meta or {}, evidence, head="box head")
    architecture = DetectorConfig(
        backbone=backbone,
        neck=neck,
        rpn_head=rpn_head,
        bbox_head=bbox_head,
        mask_head=mask_head,
        test=DetectorTestConfig(
            rpn=infer_rpn_test(config, evidence),
            rcnn=infer_rcnn_test(config, evidence, masks=mask_head is not None),
        ),
        # A graph's input is padded to multiples of 32, as published.
        preprocessing=infer_preprocessing(
            config, evidence, scale=PUBLISHED_SCALE, harmless=("Pad",)
        ),
        classes=names,
        palette=palette,
    )
    evidence.check_overrides()
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
