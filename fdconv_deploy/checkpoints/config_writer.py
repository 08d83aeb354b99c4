"""A network's configuration → the OpenMMLab config that describes the same network."""

from __future__ import annotations

from typing import Any

from fdconv_deploy.config import (
    SIZE_DIVISOR,
    BackboneConfig,
    BoxCoderConfig,
    DetectorConfig,
    Frozen,
    HeadConfig,
    Preprocessing,
    RoIConfig,
    SegmentorConfig,
)


def format_config(config: SegmentorConfig | DetectorConfig | BackboneConfig) -> str:
    """Python config text, which :func:`parse_config` reads back.

    Everything the network depends on is written out, defaults too, so that the text
    stays true if a default changes.

    Args:
        config: a segmentor's gives mmsegmentation 1.x's form, a detector's mmdetection 2.x's, a
            backbone's the ``model.backbone`` that both have.
    """
    if isinstance(config, BackboneConfig):
        sections: dict[str, Any] = {"model": {"backbone": _backbone(config, "SyncBN")}}
    elif isinstance(config, DetectorConfig):
        pipeline = _detector_pipeline(config.preprocessing)
        sections = {"model": _detector(config), "test_pipeline": pipeline}
    else:
        pipeline = _segmentor_pipeline(config.preprocessing)
        sections = {"model": _segmentor(config), "test_pipeline": pipeline}
    return "".join(f"{name} = {_source(value)}\n" for name, value in sections.items())


def _source(value: Any, indent: int = 0) -> str:
    """Python source: ``dict(…)`` over several lines, everything else as its repr."""
    inner = " " * (indent + 4)
    if isinstance(value, dict):
        items = [f"{inner}{key}={_source(item, indent + 4)},\n" for key, item in value.items()]
        return f"dict(\n{''.join(items)}{' ' * indent})"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [f"{inner}{_source(item, indent + 4)},\n" for item in value]
        return f"[\n{''.join(lines)}{' ' * indent}]"
    return repr(value)


def _fields(config: Frozen, *names: str) -> dict[str, Any]:
    """Fields of a configuration; tuples as lists, which mmdetection's FPN insists on."""
    values = {name: getattr(config, name) for name in names}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _backbone(config: BackboneConfig, norm: str) -> dict[str, Any]:
    values = config.model_dump()
    conv = values.pop("conv")
    if conv is not None:
        # The published class takes no such argument, and has no other normalisation.
        if conv["ksm_global_norm"] == "batch":
            del conv["ksm_global_norm"]
        values["conv_cfg"] = {"type": "FDConv", **conv}
    kind = "ResNet" if conv is None else "ResNet_FDConv"
    return {"type": kind, **values, "norm_cfg": {"type": norm, "requires_grad": True}}


def _segmentor(config: SegmentorConfig) -> dict[str, Any]:
    """mmsegmentation 1.x's ``model``."""
    model: dict[str, Any] = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            **_fields(config.preprocessing, "mean", "std", "bgr_to_rgb"),
        },
        "backbone": _backbone(config.backbone, "SyncBN"),
        "decode_head": _head(config.decode_head),
    }
    if config.auxiliary_head is not None:
        model["auxiliary_head"] = _head(config.auxiliary_head)
    model["test_cfg"] = config.test.model_dump(exclude_none=True)
    return model


def _head(config: HeadConfig) -> dict[str, Any]:
    values = config.model_dump()
    if config.type == "UPerHead":
        del values["input_transform"]  # it sets its own, and takes no other
    if config.type == "UPerHead" or config.input_transform is not None:
        values |= {"in_channels": list(config.in_channels), "in_index": list(config.in_index)}
    else:
        values |= {"in_channels": config.in_channels[0], "in_index": config.in_index[0]}
    norm = values.pop("norm")
    return values | {"norm_cfg": {"type": "SyncBN", "requires_grad": True} if norm else None}


def _segmentor_pipeline(preprocessing: Preprocessing) -> list[dict[str, Any]]:
    loader: dict[str, Any] = {"type": "LoadImageFromFile"}
    if preprocessing.loading == "bands":
        loader = {"type": "LoadSingleRSImageFromFile", "to_float32": preprocessing.to_float32}
    else:
        loader |= {"color_type": preprocessing.loading} if preprocessing.loading != "color" else {}
        loader |= {"to_float32": True} if preprocessing.to_float32 else {}
    steps = [loader]
    if preprocessing.scale is not None or not preprocessing.keep_ratio:
        resize = {"scale": preprocessing.scale, "keep_ratio": preprocessing.keep_ratio}
        steps.append({"type": "Resize", **resize})
    return [*steps, {"type": "PackSegInputs"}]


def _detector(config: DetectorConfig) -> dict[str, Any]:
    """mmdetection 2.x's ``model``."""
    channels, rpn, box = config.neck.out_channels, config.rpn_head, config.bbox_head
    anchors = _fields(rpn, "scales", "ratios", "strides")
    # The head's own name says two shared layers; any other number is the general head's.
    box_type: dict[str, Any] = {"type": "Shared2FCBBoxHead"}
    if box.num_shared_fcs != 2:
        box_type = {"type": "ConvFCBBoxHead", "num_shared_fcs": box.num_shared_fcs}
    roi_head = {
        "type": "StandardRoIHead",
        "bbox_roi_extractor": _extractor(box.roi, channels),
        "bbox_head": {
            **box_type,
            "in_channels": channels,
            "roi_feat_size": box.roi.output_size,
            **_fields(box, "fc_out_channels", "num_classes", "reg_class_agnostic"),
            "bbox_coder": _coder(box.bbox_coder),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False},
        },
    }
    if config.mask_head is not None:
        roi_head["mask_roi_extractor"] = _extractor(config.mask_head.roi, channels)
        roi_head["mask_head"] = {
            "type": "FCNMaskHead",
            "roi_feat_size": config.mask_head.roi.output_size,
            "in_channels": channels,
            **config.mask_head.model_dump(exclude={"roi"}),
        }
    return {
        "type": "FasterRCNN" if config.mask_head is None else "MaskRCNN",
        "backbone": _backbone(config.backbone, "BN"),
        "neck": {"type": "FPN", **_fields(config.neck, "in_channels", "out_channels", "num_outs")},
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": channels,
            "feat_channels": rpn.feat_channels,
            "anchor_generator": {"type": "AnchorGenerator", **anchors},
            "bbox_coder": _coder(rpn.bbox_coder),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
        },
        "roi_head": roi_head,
        "test_cfg": _detector_test(config),
    }


def _coder(config: BoxCoderConfig) -> dict[str, Any]:
    means, stds = list(config.means), list(config.stds)
    return {"type": "DeltaXYWHBBoxCoder", "target_means": means, "target_stds": stds}


def _extractor(config: RoIConfig, channels: int) -> dict[str, Any]:
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", **_fields(config, "output_size", "sampling_ratio")},
        "out_channels": channels,
        **_fields(config, "featmap_strides", "finest_scale"),
    }


def _detector_test(config: DetectorConfig) -> dict[str, Any]:
    stages = {"rpn": config.test.rpn.model_dump(), "rcnn": config.test.rcnn.model_dump()}
    for stage in stages.values():
        stage["nms"] = {"type": "nms", "iou_threshold": stage.pop("nms_iou_threshold")}
    if config.mask_head is None:
        del stages["rcnn"]["mask_thr_binary"]
    return stages


def _detector_pipeline(preprocessing: Preprocessing) -> list[dict[str, Any]]:
    statistics = _fields(preprocessing, "mean", "std")
    steps = [
        {"type": "Resize", "keep_ratio": preprocessing.keep_ratio},
        {"type": "RandomFlip"},
        {"type": "Normalize", **statistics, "to_rgb": preprocessing.bgr_to_rgb},
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
