"""A state dict and what was written beside it → the architecture of its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.evidence import Evidence, Fact, Inference, type_of
from fdconv_deploy.checkpoints.infer_backbone import infer_backbone
from fdconv_deploy.checkpoints.infer_head import infer_head, stock_backbone
from fdconv_deploy.checkpoints.infer_head_type import refuse_cascade
from fdconv_deploy.checkpoints.infer_layers import Shapes, backbone_prefix, kind_of, part
from fdconv_deploy.checkpoints.infer_preprocessing import (
    count_names,
    infer_classes,
    infer_preprocessing,
    infer_test_mode,
    refuse_other_normalisation,
)
from fdconv_deploy.config import BackboneConfig, HeadConfig, SegmentorConfig
from fdconv_deploy.errors import CheckpointError

_NOT_A_SEGMENTOR = {
    "detector": "it is a detector, whose architecture infer_detector_config tells",
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


def infer_segmentor_config(
    state: Shapes,
    *,
    config: Config | None = None,
    meta: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Inference[SegmentorConfig]:
    """Tell a segmentation network's architecture.

    What names and shapes tell always holds. The rest comes from ``overrides``, else from
    the config, else it is the published default and listed under ``assumed``.

    Args:
        state: names → tensors as in mmsegmentation. Only shapes are read, so tensors on the
            meta device do.
        config: the config, from the checkpoint or the user.
        meta: the checkpoint's meta data, for class names and palette.
        overrides: what the user says: dotted field names (``"backbone.style"``), or nested dicts.

    Raises:
        CheckpointError: not a segmentation network known here, or witnesses contradict.
    """
    kind = kind_of(state)
    if kind != "segmentor":
        names = ", ".join(list(state)[:3]) or "none"
        raise CheckpointError(
            "Expected a segmentation checkpoint (names under backbone. and decode_head.); "
            f"{_NOT_A_SEGMENTOR[kind]}. Its first names: {names}."
        )
    config = config or Config()
    evidence = Evidence(overrides)
    evidence.notes.extend(config.notes)
    _check_model(state, config)
    backbone = infer_whole_backbone(
        part(state, "backbone."), config, evidence, stock_backbone(part(state, "decode_head."))
    )
    widths = output_widths(backbone, part(state, "backbone."))
    head = infer_head(
        part(state, "decode_head."),
        "decode_head",
        widths,
        config.section("model", "decode_head"),
        evidence,
        names=count_names(config, meta or {}),
    )
    auxiliary = _auxiliary(state, widths, config, evidence)
    # The labels 0 and 1 of one output: a data set names both, or 1 alone.
    counts = {head.num_classes} if head.label_threshold is None else {1, 2}
    classes, palette = infer_classes(counts, config, meta or {}, evidence)
    if head.label_threshold is not None:
        evidence.notes.append(_binary_note(classes, head.label_threshold))
    architecture = SegmentorConfig(
        backbone=backbone,
        decode_head=head,
        auxiliary_head=auxiliary,
        test=infer_test_mode(config, evidence),
        preprocessing=infer_preprocessing(config, evidence, channels=backbone.in_channels),
        classes=classes,
        palette=palette,
    )
    evidence.check_overrides()
    return evidence.inference(architecture)


def infer_backbone_only(
    state: Shapes,
    *,
    config: Config | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[BackboneConfig, tuple[Fact, ...]]:
    """The backbone of a detector, a classifier or a bare backbone, and who told what."""
    config = config or Config()
    evidence = Evidence(overrides)
    backbone = infer_whole_backbone(part(state, backbone_prefix(state)), config, evidence)
    return backbone, tuple(evidence.facts)


def output_widths(backbone: BackboneConfig, state: Shapes) -> tuple[int, ...]:
    """Channels of each of the backbone's outputs, in the order of ``out_indices``."""
    expansion = 4 if "layer1.0.bn3.weight" in state else 1
    return tuple(backbone.base_channels * 2**i * expansion for i in sorted(backbone.out_indices))


def infer_whole_backbone(
    state: Shapes, config: Config, evidence: Evidence, stock: Mapping[str, Any] | None = None
) -> BackboneConfig:
    """The backbone by its tensors, names without ``backbone.``, and the config's section."""
    refuse_other_normalisation(config)
    return infer_backbone(state, config.section("model", "backbone"), evidence, stock)


def _auxiliary(
    state: Shapes, widths: tuple[int, ...], config: Config, evidence: Evidence
) -> HeadConfig | None:
    """The auxiliary head, which only training needs: one not known here is left out."""
    tensors = part(state, "auxiliary_head.")
    if not tensors:
        return None
    if all(key.split(".")[0].isdigit() for key in tensors):
        evidence.notes.append("There are several auxiliary heads; they are left out.")
        return None
    section = config.section("model", "auxiliary_head")
    trial = Evidence(evidence.overrides)
    try:
        head = infer_head(tensors, "auxiliary_head", widths, section, trial)
    except CheckpointError as error:
        if any(name.startswith("auxiliary_head.") for name in evidence.overrides):
            raise
        evidence.notes.append(f"The auxiliary head is left out. {error}")
        return None
    evidence.absorb(trial)
    return head


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
    kind = type_of(config.section("model"))
    if kind and kind != "EncoderDecoder":
        raise CheckpointError(
            f"The config's model is a {kind}. Expected mmsegmentation's EncoderDecoder; other "
            "networks are not supported yet."
        )
    necks = [key for key in state if key.startswith("neck.")]
    if necks:
        raise CheckpointError(
            f"The network has a neck ({necks[0]}). Expected a decode head right behind the "
            "backbone; necks are not supported yet."
        )
