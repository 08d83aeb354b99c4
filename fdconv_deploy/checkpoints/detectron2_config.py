"""detectron2's ``config.yaml`` → the OpenMMLab config that describes the same network.

Keys are those of detectron2's ``CfgNode`` with what Mask2Former and MaskDINO add to it. What
becomes of a network's head is named as fields of :mod:`fdconv_deploy.config` have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "naiveSyncBN")


def in_openmmlab_sections(values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The values of a ``config.yaml``, of which any may be missing, where OpenMMLab has them.

    And whether semantic scores are made at the image's own size. With ``PANOPTIC_ON`` or
    ``INSTANCE_ON`` detectron2's projects always resize mask logits first, as segments and objects
    are made of them here, too.
    """
    model, inputs = _Section(values.get("MODEL")), _Section(values.get("INPUT"))
    query = model.section("MaskDINO" if _is_maskdino(model) else "MASK_FORMER")
    panoptic = _panoptic(query.section("TEST"), _Section(values.get("TEST")))
    asked = query.section("TEST").get("SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE") is True
    short, long = inputs.get("MIN_SIZE_TEST"), inputs.get("MAX_SIZE_TEST")
    resize = _known(type="Resize", keep_ratio=True, backend="pillow")
    if isinstance(short, int) and isinstance(long, int):
        resize["scale"] = (long, short)
    layout, crop = inputs.get("FORMAT"), inputs.section("CROP")
    sections = _known(crop_size=crop.get("SIZE") if crop.get("ENABLED") else None) | {
        "model": _known(
            type="EncoderDecoder",
            backbone=_backbone(model),
            decode_head=_head(model, query),
            data_preprocessor=_known(
                mean=model.get("PIXEL_MEAN"),
                std=model.get("PIXEL_STD"),
                bgr_to_rgb=None if layout is None else layout == "RGB",
                test_cfg=_known(size_divisor=query.get("SIZE_DIVISIBILITY")),
            ),
            panoptic=panoptic,
            test_cfg={"mode": "whole"},
        ),
        "test_pipeline": [{"type": "LoadImageFromFile"}, resize],
    }
    return sections, asked and panoptic is None


class _Section(dict[str, Any]):
    """A section of which parts may be missing or something else."""

    def __init__(self, values: Any) -> None:
        super().__init__(values if isinstance(values, Mapping) else {})

    def section(self, name: str) -> _Section:
        return _Section(self.get(name))


def _is_maskdino(model: _Section) -> bool:
    return model.get("META_ARCHITECTURE") == "MaskDINO"


def _known(**values: Any) -> dict[str, Any]:
    """Without what is not stated."""
    return {name: value for name, value in values.items() if value is not None}


def _same(section: _Section, *names: str) -> dict[str, Any]:
    """The entries that are named as the fields are, in capitals."""
    return _known(**{name: section.get(name.upper()) for name in names})


def _backbone(model: _Section) -> dict[str, Any]:
    name = str(model.section("BACKBONE").get("NAME", ""))
    if "Swin" in name:
        swin = model.section("SWIN")
        same = ("patch_size", "window_size", "depths", "num_heads", "mlp_ratio", "qkv_bias")
        return {"type": "SwinTransformer", "qk_scale": swin.get("QK_SCALE")} | _known(
            embed_dims=swin.get("EMBED_DIM"),
            use_abs_pos_embed=swin.get("APE"),
            **_same(swin, *same),
        )
    if "resnet" not in name.lower():
        return _known(type=name or None)
    resnet = model.section("RESNETS")
    norm, stride = resnet.get("NORM"), resnet.get("STRIDE_IN_1X1")
    dilations = [resnet.get(f"RES{stage}_DILATION", 1) for stage in (4, 5)]
    return _known(
        type="ResNet",
        depth=resnet.get("DEPTH"),
        base_channels=resnet.get("WIDTH_PER_GROUP"),
        stem_channels=resnet.get("STEM_OUT_CHANNELS"),
        style=None if stride is None else "caffe" if stride else "pytorch",
        norm_cfg=None if norm is None else {"type": "BN" if norm in _BATCH_NORMS else norm},
        dilations=(1, 1, *dilations),
        # A stage that dilates does not stride.
        strides=(1, 2, *(1 if dilation == 2 else 2 for dilation in dilations)),
        dcn={"type": "DCN"} if any(resnet.get("DEFORM_ON_PER_STAGE") or ()) else None,
    )


def _head(model: _Section, query: _Section) -> dict[str, Any]:
    """Mask2Former's or MaskDINO's head, by the names of `QueryHeadConfig`'s fields."""
    head, architecture = model.section("SEM_SEG_HEAD"), model.get("META_ARCHITECTURE")
    layers = query.get("DEC_LAYERS")
    fields = _known(
        type="Mask2FormerHead" if architecture == "MaskFormer" else architecture,
        num_classes=head.get("NUM_CLASSES"),
        num_queries=query.get("NUM_OBJECT_QUERIES"),
        channels=head.get("CONVS_DIM"),
        mask_channels=head.get("MASK_DIM"),
        hidden_channels=query.get("HIDDEN_DIM"),
        encoder_layers=head.get("TRANSFORMER_ENC_LAYERS"),
        decoder_feedforward=query.get("DIM_FEEDFORWARD"),
        # The code takes the decoder's number for the encoder, too.
        encoder_heads=query.get("NHEADS"),
        decoder_heads=query.get("NHEADS"),
        norm_groups=32 if head.get("NORM") == "GN" else None,  # as detectron2's get_norm has it
        **_same(query, "enforce_input_proj"),
    )
    if not _is_maskdino(model):
        # One less: predictions, not layers, are counted.
        decoder_layers = layers - 1 if isinstance(layers, int) else None
        return fields | _known(decoder_layers=decoder_layers, **_same(query, "pre_norm"))
    total, entering = head.get("TOTAL_NUM_FEATURE_LEVELS"), head.get("NUM_FEATURE_LEVELS")
    names = head.get("DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES")
    entering = len(names) if isinstance(names, list) else entering
    extra = None
    if isinstance(total, int) and isinstance(entering, int):
        extra = total - entering
    fields |= _known(
        type="MaskDINOHead",
        decoder_layers=layers,
        encoder_feedforward=head.get("DIM_FEEDFORWARD"),
        extra_levels=extra,
        **_same(head, "feature_order"),
        **_same(query, "two_stage", "learn_tgt", "initialize_box_type"),
    )
    test = query.section("TEST")
    sharpened = test.get("PANO_TRANSFORM_EVAL") is not False
    if "PANO_TEMPERATURE" in test or not sharpened:
        fields["temperature"] = test.get("PANO_TEMPERATURE") if sharpened else None
    semantic = test.get("SEMANTIC_ON", True) and query.get("SEMANTIC_CE_LOSS")
    if semantic is not None:
        # Its decoder makes the output for no object whatever PANOPTIC_ON is; its inference
        # then takes sigmoids all the same.
        fields["no_object"] = bool(semantic)
        softmax = semantic and not test.get("PANOPTIC_ON")
        fields["class_scores"] = "softmax" if softmax else "sigmoid"
    return fields


def _panoptic(test: _Section, tests: _Section) -> dict[str, Any] | None:
    """`PanopticConfig`'s fields where segments or instances are asked for."""
    if not (test.get("PANOPTIC_ON") or test.get("INSTANCE_ON")):
        return None
    return _known(
        rule="detectron2",
        object_mask_thr=test.get("OBJECT_MASK_THRESHOLD"),
        iou_thr=test.get("OVERLAP_THRESHOLD"),
        max_per_image=tests.get("DETECTIONS_PER_IMAGE"),
        **_same(test, "panoptic_on", "instance_on"),
    )
