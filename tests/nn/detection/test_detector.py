"""Detectors against mmdetection's key lists, and what `Detector.forward` promises."""

from __future__ import annotations

import json

import pytest
import torch

from fdconv_deploy.architecture import BackboneConfig, FDConvConfig
from fdconv_deploy.detector_architecture import (
    DetectorArchitecture,
    FPNConfig,
    MaskHeadConfig,
    RoIConfig,
)
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.detection import build_detector
from fdconv_deploy.nn.detection.fpn import FPN

KN64 = FDConvConfig(kernel_num=64)


@pytest.mark.parametrize("kind", ["mask_rcnn", "faster_rcnn"])
@pytest.mark.parametrize("form", ["fdconv_kn64", "plain"])
def test_keys_and_parameters(oracle, kind, form):
    architecture = DetectorArchitecture(
        backbone=BackboneConfig(conv=None if form == "plain" else KN64),
        mask_head=MaskHeadConfig() if kind == "mask_rcnn" else None,
    )
    with torch.device("meta"):
        network = build_detector(architecture)
    suffix = "_keys.json" if form == "plain" else "_keys_mmdet2.28.1.json"
    published = json.loads((oracle / f"mmdet/{kind}_r50_fpn_{form}_c80{suffix}").read_text())
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == {
        entry["key"]: entry["shape"] for entry in published["keys"]
    }
    counts = json.loads((oracle / "mmdet/param_counts.json").read_text())[f"{kind}_{form}"]
    assert sum(p.numel() for p in network.parameters()) == counts["params"]
    assert sum(p.numel() for p in network.backbone.parameters()) == counts["backbone"]


def test_what_does_not_fit_is_refused():
    backbone = BackboneConfig(depth=18, base_channels=8, conv=None)
    with pytest.raises(UnsupportedLayerError, match=r"has 4 levels.*5 strides"):
        build_detector(DetectorArchitecture(backbone=backbone, neck=FPNConfig(num_outs=4)))
    with pytest.raises(UnsupportedLayerError, match=r"num_outs.*below the 4"):
        FPN(FPNConfig(num_outs=3))
    with pytest.raises(UnsupportedLayerError, match="mask head 7"):
        build_detector(
            DetectorArchitecture(backbone=backbone, mask_head=MaskHeadConfig(num_classes=7))
        )
    far = MaskHeadConfig(roi=RoIConfig(featmap_strides=(4, 8, 16, 32, 64, 128)))
    with pytest.raises(UnsupportedLayerError, match="6 levels"):
        build_detector(DetectorArchitecture(backbone=backbone, mask_head=far))
