"""detectron2's ``config.yaml`` → the OpenMMLab config that describes the same network.

Keys are those of detectron2's ``CfgNode`` with what Mask2Former and MaskDINO add to it. What
becomes of a network's head is named as fields of :mod:`fdconv_deploy.config` have it.
"""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

from fdconv_deploy.checkpoints.config_parser import (
    MAX_ITEMS,
    Config,
    Section,
    Unreadable,
    given_config,
    printable,
)
from fdconv_deploy.errors import CheckpointError

_BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "naiveSyncBN")


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader, to which every tag of Python's is a value that could not be read."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Unreadable:
    return Unreadable(f"its tag !!python/{suffix} is code", node.start_mark.line + 1)


_YamlLoader.add_multi_constructor("tag:yaml.org,2002:python/", _tagged)


def _written_out(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """The number of values in a node where every alias is written out."""
    if node not in known:
        known[node] = 1  # where a node holds itself
        inside = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            inside = [one for pair in inside for one in pair]
        known[node] = 1 + sum(_written_out(one, known) for one in inside)
    return known[node]


def parse_yaml(text: str, name: str) -> Config:
    """detectron2's ``config.yaml``, where OpenMMLab's configs have its values."""
    try:
        loader = _YamlLoader(text)
        node = loader.get_single_node()
        # A few lines of aliases to aliases would fill any memory.
        if node is not None and _written_out(node, {}) > MAX_ITEMS:
            raise CheckpointError(
                f"{name} repeats itself by aliases to more than {MAX_ITEMS:,} values. "
                "Expected the config.yaml that training wrote into OUTPUT_DIR, of a few hundred."
            )
        values = None if node is None else printable(loader.construct_document(node))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = str(error).strip().splitlines()
        raise CheckpointError(
            f"{name} is not valid YAML: {first[0][:100] if first else type(error).__name__}."
        ) from None
    if not isinstance(values, dict) or not isinstance(values.get("MODEL"), dict):
        raise CheckpointError(
            f"{name} is no config of detectron2's: expected MODEL and its sections, as the "
            "config.yaml has them that training writes into OUTPUT_DIR."
        )
    config = given_config(values, name)
    notes = list(config.notes)
    if "_BASE_" in values:
        notes.append(
            f"{name} builds on {str(values['_BASE_'])[:80]}, which is not read; what that sets is "
            "unknown here. Give the full config.yaml that training wrote into OUTPUT_DIR."
        )
    sections, resizes_first = _in_openmmlab_sections(config.section())
    if resizes_first:
        notes.append(
            f"{name} has SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE: masks are resized to the image "
            "before they become scores. Scores are made at the input's size here and then resized; "
            "where the two sizes differ, labels at borders do."
        )
    return Config(sections, tuple(notes))


def _in_openmmlab_sections(values: Section) -> tuple[dict[str, Any], bool]:
    """The values of a ``config.yaml``, of which any may be missing, where OpenMMLab has them.

    And whether semantic scores are made at the image's own size. With ``PANOPTIC_ON`` or
    ``INSTANCE_ON`` detectron2's projects always resize mask logits first, as segments and objects
    are made of them here, too.
    """
    model, inputs = values.section("MODEL"), values.section("INPUT")
    query = model.section("MaskDINO" if _is_maskdino(model) else "MASK_FORMER")
    panoptic = _panoptic(query.section("TEST"), values.section("TEST"))
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


def _is_maskdino(model: Section) -> bool:
    return model.get("META_ARCHITECTURE") == "MaskDINO"


def _known(**values: Any) -> dict[str, Any]:
    """Without what is not stated."""
    return {name: value for name, value in values.items() if value is not None}


def _same(section: Section, *names: str) -> dict[str, Any]:
    """The entries that are named as the fields are, in capitals."""
    return _known(**{name: section.get(name.upper()) for name in names})


def _backbone(model: Section) -> dict[str, Any]:
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


def _head(model: Section, query: Section) -> dict[str, Any]:
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


def _panoptic(test: Section, tests: Section) -> dict[str, Any] | None:
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
