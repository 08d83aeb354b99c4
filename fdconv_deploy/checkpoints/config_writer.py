"""A network's configuration → the OpenMMLab config that describes the same network."""

from __future__ import annotations

from typing import Any

from fdconv_deploy.config import (
    SIZE_DIVISOR,
    BackboneConfig,
    BoxCoderConfig,
    ConvNeXtConfig,
    DetectorConfig,
    Frozen,
    HeadConfig,
    Preprocessing,
    QueryHeadConfig,
    RCNNTestConfig,
    ResNetConfig,
    RoIConfig,
    RPNHeadConfig,
    RPNTestConfig,
    SegmentorConfig,
    SwinTransformerConfig,
)

_CODER: dict[str, Any] = {"clip_border": True, "add_ctr_clamp": False}
_ALIGN: dict[str, Any] = {"aligned": True, "pool_mode": "avg"}
_NMS_ENTRIES = ("nms.iou_threshold", "nms.iou_thr", "nms_thr")

# Sections of mmdetection's ``model``, the types each may have (the first is written), and what
# is built in one way only.
DETECTOR_TYPES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "neck": (
        ("FPN",),
        {"add_extra_convs": False, "start_level": 0, "end_level": -1, "norm_cfg": None},
    ),
    "rpn_head": (("RPNHead",), {}),
    "rpn_head.anchor_generator": (
        ("AnchorGenerator",),
        dict.fromkeys(("base_sizes", "centers", "octave_base_scale", "scales_per_octave"))
        | {"center_offset": 0, "scale_major": True},
    ),
    "rpn_head.bbox_coder": (("DeltaXYWHBBoxCoder",), _CODER),
    "roi_head": (("StandardRoIHead",), {}),
    "roi_head.bbox_head": (
        ("Shared2FCBBoxHead", "ConvFCBBoxHead", "BBoxHead"),
        {"with_avg_pool": False, "reg_decoded_bbox": False},
    ),
    "roi_head.bbox_head.bbox_coder": (("DeltaXYWHBBoxCoder",), _CODER),
    "roi_head.bbox_roi_extractor": (("SingleRoIExtractor",), {}),
    "roi_head.bbox_roi_extractor.roi_layer": (("RoIAlign",), _ALIGN),
    "roi_head.mask_head": (("FCNMaskHead",), {}),
    "roi_head.mask_head.upsample_cfg": (("deconv",), {}),
    "roi_head.mask_roi_extractor": (("SingleRoIExtractor",), {}),
    "roi_head.mask_roi_extractor.roi_layer": (("RoIAlign",), _ALIGN),
    "test_cfg.rpn": ((), {"nms_across_levels": False}),
    "test_cfg.rpn.nms": (("nms",), {"class_agnostic": False}),
    "test_cfg.rcnn.nms": (("nms",), {"class_agnostic": False}),
}
# Which of those sections describes which part of `DetectorConfig`.
DETECTOR_SECTIONS = {
    "neck": "neck",
    "rpn_head": "rpn_head",
    "rpn_head.bbox_coder": "rpn_head.bbox_coder",
    "bbox_head": "roi_head.bbox_head",
    "bbox_head.bbox_coder": "roi_head.bbox_head.bbox_coder",
    "bbox_head.roi": "roi_head.bbox_roi_extractor",
    "mask_head": "roi_head.mask_head",
    "mask_head.roi": "roi_head.mask_roi_extractor",
    "test.rpn": "test_cfg.rpn",
    "test.rcnn": "test_cfg.rcnn",
}
# Entries of those sections that are not named as the field is: the one to write, then older ones.
CONFIG_ENTRIES: dict[type[Frozen], dict[str, tuple[str, ...]]] = {
    RPNHeadConfig: {
        name: (f"anchor_generator.{name}",) for name in ("scales", "ratios", "strides")
    },
    BoxCoderConfig: {"means": ("target_means",), "stds": ("target_stds",)},
    RoIConfig: {
        "output_size": ("roi_layer.output_size", "roi_layer.out_size"),
        "sampling_ratio": ("roi_layer.sampling_ratio", "roi_layer.sample_num"),
    },
    RPNTestConfig: {
        "max_per_img": ("max_per_img", "max_num", "nms_post"),
        "nms_iou_threshold": _NMS_ENTRIES,
    },
    RCNNTestConfig: {"nms_iou_threshold": _NMS_ENTRIES},
}


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


def _given(config: Frozen) -> dict[str, Any]:
    """All fields, without those that OpenMMLab's classes do not all take, where they are None."""
    values = config.model_dump()
    optional = ("expansion", "out_channels", "threshold")
    return {k: v for k, v in values.items() if v is not None or k not in optional}


def _backbone(config: BackboneConfig, norm: str) -> dict[str, Any]:
    values = _given(config)
    values.pop("type", None)
    kind, conv = config.type, values.pop("conv")
    if conv is not None:
        kind, values["conv_cfg"] = f"{kind}_FDConv", _conv(conv)
    if isinstance(config, ConvNeXtConfig):
        values["arch"] = {name: values.pop(name) for name in ("channels", "depths")}
    if isinstance(config, ResNetConfig):
        values["norm_cfg"] = {"type": norm, "requires_grad": True}
    if isinstance(config, SwinTransformerConfig) and config.merging == "unfold":
        del values["merging"]  # which is all that OpenMMLab's class has
    return {"type": kind, **values}


def _conv(fields: dict[str, Any]) -> dict[str, Any]:
    # The published class takes no such argument, and has no other normalisation.
    if fields["ksm_global_norm"] == "batch":
        del fields["ksm_global_norm"]
    return {"type": "FDConv", **fields}


def _segmentor(config: SegmentorConfig) -> dict[str, Any]:
    """The ``model`` of a config of mmsegmentation 1.x."""
    model: dict[str, Any] = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            **_fields(config.preprocessing, "mean", "std", "bgr_to_rgb"),
            "test_cfg": {"size_divisor": config.preprocessing.size_divisor},
        },
        "backbone": _backbone(config.backbone, "SyncBN"),
        "decode_head": _head(config.decode_head),
    }
    if config.auxiliary_head is not None:
        model["auxiliary_head"] = _head(config.auxiliary_head)
    if config.panoptic is not None:
        model["panoptic"] = config.panoptic.model_dump()
    model["test_cfg"] = config.test.model_dump(exclude_none=True)
    return model


def _head(config: HeadConfig) -> dict[str, Any]:
    values = _given(config)
    if isinstance(config, QueryHeadConfig):
        # By the names of its fields: mmdetection's sections have no place for all of MaskDINO's.
        conv = values.pop("conv")
        return values if conv is None else values | {"conv_cfg": _conv(conv)}
    each = config.type in ("UPerHead", "SegformerHead")
    if each:
        del values["input_transform"]  # they set their own, and take no other
    if each or config.input_transform is not None:
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
    plain = preprocessing.keep_ratio and preprocessing.resample == "opencv"
    if preprocessing.scale is not None or not plain:
        resize: dict[str, Any] = {
            "scale": preprocessing.scale,
            "keep_ratio": preprocessing.keep_ratio,
        }
        resize |= {"backend": "pillow"} if preprocessing.resample == "pillow" else {}
        steps.append({"type": "Resize", **resize})
    return [*steps, {"type": "PackSegInputs"}]


def _detector(config: DetectorConfig) -> dict[str, Any]:
    """The ``model`` of a config of mmdetection 2.x."""
    masks, box = config.mask_head is not None, config.bbox_head
    model: dict[str, Any] = {
        "type": "MaskRCNN" if masks else "FasterRCNN",
        "backbone": _backbone(config.backbone, "BN"),
    }
    for part in ("neck", "rpn_head", "bbox_head", "mask_head", "test"):
        if getattr(config, part) is not None:
            _put_fields(model, part, getattr(config, part))
    channels, roi_head = config.neck.out_channels, model["roi_head"]
    model["rpn_head"] |= {
        "in_channels": channels,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
    }
    box_head = roi_head["bbox_head"]
    box_head["loss_cls"] = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    # The head's own name says two shared layers; any other number is the general head's.
    if box.num_shared_fcs == 2:
        del box_head["num_shared_fcs"]
    else:
        box_head["type"] = "ConvFCBBoxHead"
    for name, head in (("bbox", config.bbox_head), ("mask", config.mask_head)):
        if head is not None:
            sizes = {"in_channels": channels, "roi_feat_size": head.roi.output_size}
            roi_head[f"{name}_head"] |= sizes
            roi_head[f"{name}_roi_extractor"]["out_channels"] = channels
    if not masks:
        del model["test_cfg"]["rcnn"]["mask_thr_binary"]
    return model


def _put_fields(model: dict[str, Any], part: str, config: Frozen) -> None:
    """Write a part of a detector's configuration where mmdetection's ``model`` has it."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Frozen):
            _put_fields(model, f"{part}.{name}", value)
            continue
        entry = CONFIG_ENTRIES.get(type(config), {}).get(name, (name,))[0]
        *path, last = f"{DETECTOR_SECTIONS[part]}.{entry}".split(".")
        section, known = model, ""
        for step in path:
            known = f"{known}.{step}".removeprefix(".")
            types = DETECTOR_TYPES.get(known, ((), {}))[0]
            section = section.setdefault(step, {"type": types[0]} if types else {})
        # mmdetection's FPN insists on lists.
        section[last] = list(value) if isinstance(value, tuple) else value


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
