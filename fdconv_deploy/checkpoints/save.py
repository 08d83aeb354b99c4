"""A trained network → a checkpoint file as mmengine publishes one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.write import write_checkpoint
from fdconv_deploy.config import DecodeHeadConfig, DetectorConfig, MaskHeadConfig, SegmentorConfig
from fdconv_deploy.errors import CheckpointError


def save_checkpoint(
    path: str | Path,
    state_dict: Mapping[str, Tensor] | nn.Module,
    architecture: SegmentorConfig | DetectorConfig,
    *,
    config_text: str | None = None,
) -> None:
    """Write a segmentor as mmengine publishes one, a detector as mmdetection 2.x saves one.

    The first is ``{meta: {cfg, dataset_meta}, state_dict}``, the second ``{meta: {config,
    CLASSES, PALETTE}, state_dict}``.

    The config text is generated from ``architecture``, and reading the file back infers an
    equal one. The file appears whole or not at all: it is written beside ``path`` under a
    temporary name, then renamed.

    Args:
        path: where to write. An existing file is replaced; its folder must exist.
        state_dict: names → tensors as in mmsegmentation (``backbone.…``, ``decode_head.…``) or
            mmdetection (``roi_head.…``), or the network itself.
        architecture: what the weights belong to.
        config_text: Python config text to store in place of the generated one.

    Raises:
        CheckpointError: the weights do not belong to ``architecture``, or the file can't be
            written.
    """
    path = Path(path)
    weights = state_dict.state_dict() if isinstance(state_dict, nn.Module) else state_dict
    _check(weights, architecture)
    write_checkpoint(path, weights, _meta(architecture, config_text))


def _meta(
    architecture: SegmentorConfig | DetectorConfig, config_text: str | None
) -> dict[str, Any]:
    palette = [list(colour) for colour in architecture.palette]
    text = format_config(architecture) if config_text is None else config_text
    if isinstance(architecture, DetectorConfig):
        return {"config": text, "CLASSES": architecture.classes, "PALETTE": palette}
    return {"cfg": text, "dataset_meta": {"classes": architecture.classes, "palette": palette}}


def _check(weights: Mapping[str, Tensor], architecture: SegmentorConfig | DetectorConfig) -> None:
    optional: DecodeHeadConfig | MaskHeadConfig | None
    if isinstance(architecture, DetectorConfig):
        kind, library, background = "detector", "mmdetection", 1
        name, expected = "roi_head.bbox_head.fc_cls.weight", architecture.bbox_head.num_classes
        part, prefix, optional = "mask head", "roi_head.mask_head.", architecture.mask_head
    else:
        kind, library, background = "segmentor", "mmsegmentation", 0
        name, expected = "decode_head.conv_seg.weight", architecture.decode_head.outputs
        part, prefix, optional = "auxiliary head", "auxiliary_head.", architecture.auxiliary_head
    if name not in weights:
        raise CheckpointError(
            f"The weights to save have no {name}: expected a {kind}'s state dict, with names as "
            f"in {library}, found {', '.join(list(weights)[:3]) or 'nothing'}…"
        )
    found = weights[name].shape[0] - background
    if found != expected:
        raise CheckpointError(
            f"The weights to save have {found} classes ({name}) and the architecture {expected}. "
            "Give the architecture the network was built from."
        )
    has_part = any(key.startswith(prefix) for key in weights)
    if has_part != (optional is not None):
        there, wanted = ("a", "none") if has_part else ("no", "one")
        raise CheckpointError(
            f"The weights to save have {there} {part} and the architecture {wanted}. "
            "Give the architecture the network was built from."
        )
