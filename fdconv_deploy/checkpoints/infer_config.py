"""A network's configuration, from its state dict and what was written beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.infer_backbone import infer_backbone
from fdconv_deploy.checkpoints.infer_classes_and_preprocessing import (
    infer_classes,
    infer_preprocessing,
    infer_test_mode,
)
from fdconv_deploy.checkpoints.infer_detector import infer_detector
from fdconv_deploy.checkpoints.infer_head import infer_head, refuse_cascade, stock_backbone
from fdconv_deploy.checkpoints.infer_query_head import (
    infer_panoptic,
    infer_query_head,
    query_head_type,
)
from fdconv_deploy.checkpoints.settings import (
    Evidence,
    Inference,
    SettingResolver,
    refuse_unsupported,
)
from fdconv_deploy.checkpoints.state_dict import (
    Shapes,
    backbone_prefix,
    framework_of,
    in_openmmlab_names,
    kind_of,
    part,
)
from fdconv_deploy.config import SIZE_DIVISOR, HeadConfig, QueryHeadConfig, SegmentorConfig
from fdconv_deploy.errors import CheckpointError

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
        return evidence.inference(infer_detector(state, evidence))
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
    refuse_unsupported("model", config.section("model"), "EncoderDecoder", "Mask2Former")
    necks = [key for key in state if key.startswith("neck.")]
    if necks:
        raise CheckpointError(
            f"The network has a neck ({necks[0]}). Expected a decode head right behind the "
            "backbone; necks are not supported yet."
        )
