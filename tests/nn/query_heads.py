"""Networks with query heads of the reference data: configurations, weights, inputs, answers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fdconv_deploy.checkpoints.reading import read_checkpoint
from fdconv_deploy.checkpoints.state_dict import backbone_from_detectron2, head_from_detectron2
from fdconv_deploy.config import (
    Mask2FormerHeadConfig,
    MaskDINOHeadConfig,
    PanopticConfig,
    Preprocessing,
    SegmentorConfig,
)
from fdconv_deploy.nn.segmentor import Segmentor
from tests.nn.backbones.published import FAMILIES, PROJECTS, normalised

OPENMMLAB = ("mask2former_r50", "mask2former_swin", "mask2former_panoptic")
_CLASSES = {"mask2former_r50": 19, "mask2former_swin": 9, "mask2former_panoptic": 10}
# Of the panoptic network's configuration and the index of detectron2's.
PANOPTIC = PanopticConfig(
    thing_classes=tuple(range(6)),
    instance_on=True,
    iou_thr=0.8,
    filter_low_score=True,
    max_per_image=20,
)


def openmmlab(family: str, kind: str = "fdconv") -> SegmentorConfig:
    """The configuration of a reference checkpoint of mmsegmentation or mmdetection."""
    backbone = FAMILIES[family]
    if kind == "plain":
        backbone = backbone.model_copy(update={"conv": None})
    head = Mask2FormerHeadConfig(
        in_channels=backbone.output_widths,
        in_index=(0, 1, 2, 3),
        channels=32,
        hidden_channels=32,
        mask_channels=32,
        num_classes=_CLASSES[family],
        num_queries=14 if family == "mask2former_panoptic" else 12,
        norm_groups=8,
        encoder_layers=2,
        encoder_heads=4,
        encoder_feedforward=64,
        decoder_layers=4,
        decoder_heads=4,
        decoder_feedforward=96,
    )
    padding = 1 if family == "mask2former_swin" else 32
    return SegmentorConfig(
        backbone=backbone,
        decode_head=head,
        preprocessing=Preprocessing(size_divisor=padding),
        panoptic=PANOPTIC if family == "mask2former_panoptic" else None,
    )


def detectron2(project: str) -> SegmentorConfig:
    """The configuration of a reference checkpoint of Mask2Former's or MaskDINO's own code."""
    backbone = PROJECTS[project]
    shared: dict[str, Any] = {
        "in_channels": backbone.output_widths,
        "in_index": (0, 1, 2, 3),
        "channels": 64,
        "mask_channels": 48,
        "num_classes": 11,
        "num_queries": 20,
        "encoder_layers": 2,
        "decoder_feedforward": 96,
    }
    head: Mask2FormerHeadConfig | MaskDINOHeadConfig
    if project.startswith("mask2former"):
        head = Mask2FormerHeadConfig(**shared, hidden_channels=64, decoder_layers=5)
    elif project == "maskdino_r50":
        head = MaskDINOHeadConfig(
            **shared,
            encoder_feedforward=96,
            decoder_layers=2,
            two_stage=False,
            no_object=True,
            class_scores="softmax",
        )
    else:
        head = MaskDINOHeadConfig(
            **shared,
            encoder_feedforward=96,
            decoder_layers=2,
            extra_levels=1,
            feature_order="low2high",
        )
    preprocessing = Preprocessing(size_divisor=32, resample="pillow")
    return SegmentorConfig(backbone=backbone, decode_head=head, preprocessing=preprocessing)


def load_openmmlab(oracle: Path, family: str, kind: str) -> Segmentor:
    """The network of OpenMMLab's checkpoint."""
    folder = oracle / "families" / family
    index = json.loads((folder / f"{kind}_index.json").read_text())
    state = read_checkpoint(folder / index["checkpoint"]).state_dict
    prefix = "panoptic_head."
    state = {
        (f"decode_head.{key.removeprefix(prefix)}" if key.startswith(prefix) else key): value
        for key, value in state.items()
    }
    network = Segmentor(openmmlab(family, kind)).eval()
    network.load_state_dict(state)
    return network


def load_detectron2(oracle: Path, project: str) -> Segmentor:
    """The network of detectron2's checkpoint."""
    (path,) = (oracle / "query_heads" / project).glob("model_final.*")
    if path.suffix == ".pkl":
        model = pickle.loads(path.read_bytes())["model"]
        state = {name: torch.from_numpy(np.array(value)) for name, value in model.items()}
    else:
        state = dict(read_checkpoint(path).state_dict)
    network = Segmentor(detectron2(project)).eval()
    network.load_state_dict(renamed(state))
    return network


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole detectron2 network's tensors by the names that they have here."""
    parts = {}
    for prefix, name, rename in (
        ("backbone.", "backbone.", backbone_from_detectron2),
        ("sem_seg_head.", "decode_head.", head_from_detectron2),
    ):
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        parts.update({f"{name}{key}": value for key, value in rename(part).items()})
    return parts


def padded(image: Tensor, divisor: int) -> Tensor:
    """Zeros at the right and the bottom, to multiples of ``divisor``."""
    height, width = image.shape[-2:]
    return nn.functional.pad(image, (0, -width % divisor, 0, -height % divisor))


def case_tensors(oracle: Path, family: str, kind: str | None, case: str) -> dict[str, Tensor]:
    """A case's tensors, among them always the ``input``."""
    if kind is None:
        tensors = load_file(oracle / "query_heads" / family / f"case_{case}.safetensors")
        image, bgr, divisor = tensors["image"], False, 32
    else:
        tensors = load_file(oracle / "families" / family / f"{kind}_{case}.safetensors")
        image, bgr = tensors.get("image_bgr_u8", torch.empty(0)), True
        divisor = openmmlab(family).preprocessing.size_divisor
    if "pipeline_u8" in tensors:  # the image as the framework's own pipeline resized it
        image = tensors["pipeline_u8"].permute(1, 2, 0)
    if "input" not in tensors:
        tensors["input"] = padded(normalised(image, bgr=bgr), divisor)
    return tensors
