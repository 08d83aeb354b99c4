"""Backbones of the reference checkpoints: their configurations, weights, inputs and outputs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fdconv_deploy.checkpoints.reading import read_checkpoint
from fdconv_deploy.checkpoints.state_dict import backbone_from_detectron2
from fdconv_deploy.config import (
    BackboneConfig,
    ConvNeXtConfig,
    FDConvConfig,
    MixVisionTransformerConfig,
    Preprocessing,
    ResNetConfig,
    SwinTransformerConfig,
)
from fdconv_deploy.nn.backbones import build_backbone
from fdconv_deploy.runtime.preprocessing import normalise

_MIT = MixVisionTransformerConfig(
    num_layers=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), conv=FDConvConfig(kernel_num=8)
)
_SWIN = SwinTransformerConfig(
    embed_dims=20, depths=(2, 2, 2, 1), num_heads=(2, 4, 5, 8), conv=FDConvConfig()
)
_CONVNEXT = ConvNeXtConfig(channels=(20, 36, 48, 64), depths=(2, 1, 3, 1), conv=FDConvConfig())
_RESNET = ResNetConfig(base_channels=10)
# OpenMMLab's frameworks.
FAMILIES: dict[str, BackboneConfig] = {
    "segformer_mit": _MIT,
    "upernet_swin": _SWIN,
    "mask2former_swin": _SWIN,
    "upernet_convnext": _CONVNEXT,
    "mask_rcnn_convnext": _CONVNEXT,
    "mask2former_r50": _RESNET,
    "mask2former_panoptic": _RESNET,
}
_D2_SWIN = SwinTransformerConfig(
    embed_dims=20,
    depths=(2, 2, 2, 1),
    num_heads=(1, 2, 4, 8),
    window_size=4,
    merging="position",
    conv=FDConvConfig(kernel_num=10),
)
_D2_RESNET = ResNetConfig(base_channels=18, expansion=2, conv=FDConvConfig(kernel_num=6))
# detectron2's.
PROJECTS: dict[str, BackboneConfig] = {
    "mask2former_swin": _D2_SWIN,
    "maskdino_swin": _D2_SWIN,
    "mask2former_r50": _D2_RESNET,
    "maskdino_r50": _D2_RESNET,
}


def part_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors, without its prefix."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_family(oracle: Path, family: str, kind: str) -> nn.Module:
    """The ``plain`` or ``fdconv`` backbone of OpenMMLab's checkpoint."""
    folder = oracle / "families" / family
    index = json.loads((folder / f"{kind}_index.json").read_text())
    config = FAMILIES[family]
    if kind == "plain":
        config = config.model_copy(update={"conv": None})
    network = build_backbone(config).eval()
    network.load_state_dict(part_of(read_checkpoint(folder / index["checkpoint"]).state_dict))
    return network


def float32_error(oracle: Path, family: str, kind: str, case: str) -> float:
    """Error of the framework's float32 against its float64, of the largest logit."""
    index = json.loads((oracle / "families" / family / f"{kind}_index.json").read_text())
    return float(index["cases"][case].get("rel_err_float32_vs_float64", 0.0))


def family_cases(oracle: Path, family: str, kind: str) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Of each case with feature maps, the backbone's input and they."""
    folder = oracle / "families" / family
    found = {}
    for case in json.loads((folder / f"{kind}_index.json").read_text())["cases"]:
        tensors = load_file(folder / f"{kind}_{case}.safetensors")
        features = [tensors[name] for name in sorted(tensors) if name in _FEATURES]
        if features:
            image = tensors.get("input")
            found[case] = (normalised(tensors["image_bgr_u8"], bgr=True), features)
            found[case] = (found[case][0] if image is None else image, features)
    return found


_FEATURES = [f"feat{level}" for level in range(4)]


def load_project(oracle: Path, project: str) -> nn.Module:
    """The backbone of detectron2's checkpoint."""
    (path,) = (oracle / "query_heads" / project).glob("model_final.*")
    if path.suffix == ".pkl":
        model = pickle.loads(path.read_bytes())["model"]
        state = {name: torch.from_numpy(np.array(value)) for name, value in model.items()}
    else:
        state = read_checkpoint(path).state_dict
    network = build_backbone(PROJECTS[project]).eval()
    network.load_state_dict(backbone_from_detectron2(part_of(state)))
    return network


def project_cases(oracle: Path, project: str) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """As `family_cases`."""
    found = {}
    for path in sorted((oracle / "query_heads" / project).glob("case_*.safetensors")):
        tensors = load_file(path)
        features = [tensors[f"backbone.res{level}"] for level in (2, 3, 4, 5)]
        image = tensors.get("input")
        if image is None:
            image = normalised(tensors["image"], bgr=False)
            height, width = image.shape[-2:]
            image = nn.functional.pad(image, (0, -width % 32, 0, -height % 32))
        found[path.stem] = (image, features)
    return found


def normalised(image: Tensor, *, bgr: bool) -> Tensor:
    """``(H, W, 3)`` uint8 -> ``(1, 3, H, W)`` float32."""
    rgb = image.numpy()[..., ::-1] if bgr else image.numpy()
    return torch.from_numpy(normalise(np.ascontiguousarray(rgb), Preprocessing()))[None]
