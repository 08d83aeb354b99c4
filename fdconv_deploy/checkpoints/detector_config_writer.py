"""A :class:`DetectorConfig` → the mmdetection config that describes the same network."""

from __future__ import annotations

from typing import Any

from fdconv_deploy.checkpoints.config_writer import backbone_section, config_source
from fdconv_deploy.config import (
    SIZE_DIVISOR,
    BoxCoderConfig,
    BoxHeadConfig,
    DetectorConfig,
    DetectorTestConfig,
    MaskHeadConfig,
    Preprocessing,
    RoIConfig,
    RPNHeadConfig,
)


def format_detector_config(architecture: DetectorConfig) -> str:
    """Python config text in mmdetection 2.x's form.

    Everything the network depends on is written out, defaults too, so that the text
    stays true if a default changes.
    """
    channels = architecture.neck.out_channels
    mask_head = architecture.mask_head
    roi_head = {
        "type": "StandardRoIHead",
        "bbox_roi_extractor": _extractor(architecture.bbox_head.roi, channels),
        "bbox_head": _box_head(architecture.bbox_head, channels),
    }
    if mask_head is not None:
        roi_head["mask_roi_extractor"] = _extractor(mask_head.roi, channels)
        roi_head["mask_head"] = _mask_head(mask_head, channels)
    model = {
        "type": "FasterRCNN" if mask_head is None else "MaskRCNN",
        "backbone": backbone_section(architecture.backbone)
        | {"norm_cfg": {"type": "BN", "requires_grad": True}},
        "neck": {
            "type": "FPN",
            "in_channels": list(architecture.neck.in_channels),
            "out_channels": channels,
            "num_outs": architecture.neck.num_outs,
        },
        "rpn_head": _rpn_head(architecture.rpn_head, channels),
        "roi_head": roi_head,
        "test_cfg": _test(architecture.test, masks=mask_head is not None),
    }
    pipeline = _pipeline(architecture.preprocessing)
    return config_source({"model": model, "test_pipeline": pipeline})


def _coder(config: BoxCoderConfig) -> dict[str, Any]:
    return {
        "type": "DeltaXYWHBBoxCoder",
        "target_means": list(config.means),
        "target_stds": list(config.stds),
    }


def _rpn_head(config: RPNHeadConfig, channels: int) -> dict[str, Any]:
    return {
        "type": "RPNHead",
        "in_channels": channels,
        "feat_channels": config.feat_channels,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "scales": list(config.scales),
            "ratios": list(config.ratios),
            "strides": list(config.strides),
        },
        "bbox_coder": _coder(config.bbox_coder),
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
    }


def _extractor(config: RoIConfig, channels: int) -> dict[str, Any]:
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {
            "type": "RoIAlign",
            "output_size": config.output_size,
            "sampling_ratio": config.sampling_ratio,
        },
        "out_channels": channels,
        "featmap_strides": list(config.featmap_strides),
        "finest_scale": config.finest_scale,
    }


def _box_head(config: BoxHeadConfig, channels: int) -> dict[str, Any]:
    shared = config.num_shared_fcs
    # The head's own name says two; any other number is the general head's.
    named: dict[str, Any] = {"type": "Shared2FCBBoxHead"}
    if shared != 2:
        named = {"type": "ConvFCBBoxHead", "num_shared_fcs": shared}
    return {
        **named,
        "in_channels": channels,
        "fc_out_channels": config.fc_out_channels,
        "roi_feat_size": config.roi.output_size,
        "num_classes": config.num_classes,
        "bbox_coder": _coder(config.bbox_coder),
        "reg_class_agnostic": config.reg_class_agnostic,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False},
    }


def _mask_head(config: MaskHeadConfig, channels: int) -> dict[str, Any]:
    return {
        "type": "FCNMaskHead",
        "num_convs": config.num_convs,
        "roi_feat_size": config.roi.output_size,
        "in_channels": channels,
        "conv_kernel_size": config.conv_kernel_size,
        "conv_out_channels": config.conv_out_channels,
        "num_classes": config.num_classes,
        "class_agnostic": config.class_agnostic,
    }


def _test(config: DetectorTestConfig, *, masks: bool) -> dict[str, Any]:
    rpn, rcnn = config.rpn, config.rcnn
    second = {
        "score_thr": rcnn.score_thr,
        "nms": {"type": "nms", "iou_threshold": rcnn.nms_iou_threshold},
        "max_per_img": rcnn.max_per_img,
    }
    if masks:
        second["mask_thr_binary"] = rcnn.mask_thr_binary
    return {
        "rpn": {
            "nms_pre": rpn.nms_pre,
            "max_per_img": rpn.max_per_img,
            "nms": {"type": "nms", "iou_threshold": rpn.nms_iou_threshold},
            "min_bbox_size": rpn.min_bbox_size,
        },
        "rcnn": second,
    }


def _pipeline(preprocessing: Preprocessing) -> list[dict[str, Any]]:
    steps = [
        {"type": "Resize", "keep_ratio": preprocessing.keep_ratio},
        {"type": "RandomFlip"},
        {
            "type": "Normalize",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "to_rgb": preprocessing.bgr_to_rgb,
        },
        {"type": "Pad", "size_divisor": SIZE_DIVISOR},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"]},
    ]
    outer = {
        "type": "MultiScaleFlipAug",
        "img_scale": preprocessing.scale,
        "flip": False,
        "transforms": steps,
    }
    return [{"type": "LoadImageFromFile"}, outer]
