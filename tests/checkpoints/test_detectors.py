"""Detectors: settings from weights, from the config, assumed; and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdconv_deploy.checkpoints import (
    LoadedDetector,
    inspect_checkpoint,
    load_checkpoint,
    load_segmentor,
    save_checkpoint,
)
from fdconv_deploy.checkpoints.config_parser import Config, parse_config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.settings import Inference
from fdconv_deploy.config import (
    BoxCoderConfig,
    BoxHeadConfig,
    DetectorConfig,
    DetectorTestConfig,
    FDConvConfig,
    FPNConfig,
    MaskHeadConfig,
    Preprocessing,
    RCNNTestConfig,
    ResNetConfig,
    RoIConfig,
    RPNHeadConfig,
    RPNTestConfig,
)
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn.detection import Detector
from tests.checkpoints.small import key_list


def small(*, masks: bool = True, conv: FDConvConfig | None = None, **fields: Any) -> Any:
    """Nothing in it is a default, so that nothing is right by chance."""
    mask_head = MaskHeadConfig(
        num_classes=3,
        num_convs=1,
        conv_kernel_size=5,
        conv_out_channels=6,
        roi=RoIConfig(output_size=6, featmap_strides=(4, 8, 16), sampling_ratio=2),
    )
    values: dict[str, Any] = {
        "backbone": ResNetConfig(depth=18, base_channels=18, conv=conv or FDConvConfig()),
        "neck": FPNConfig(in_channels=(18, 36, 72, 144), out_channels=8, num_outs=6),
        "rpn_head": RPNHeadConfig(
            feat_channels=7,
            scales=(2.0, 4.0),
            ratios=(0.25, 1.0),
            strides=(4, 8, 16, 32, 64, 128),
            bbox_coder=BoxCoderConfig(means=(0.1, 0, 0, 0), stds=(0.5, 0.5, 0.5, 0.5)),
        ),
        "bbox_head": BoxHeadConfig(
            num_classes=3,
            fc_out_channels=10,
            num_shared_fcs=1,
            bbox_coder=BoxCoderConfig(stds=(0.2, 0.2, 0.4, 0.4)),
            roi=RoIConfig(output_size=5, featmap_strides=(4, 8), finest_scale=28),
        ),
        "mask_head": mask_head if masks else None,
        "test": DetectorTestConfig(
            rpn=RPNTestConfig(nms_pre=50, max_per_img=40, nms_iou_threshold=0.6, min_bbox_size=2),
            rcnn=RCNNTestConfig(score_thr=0.1, nms_iou_threshold=0.4, max_per_img=30)
            if not masks
            else RCNNTestConfig(
                score_thr=0.1, nms_iou_threshold=0.4, max_per_img=30, mask_thr_binary=0.6
            ),
        ),
        "preprocessing": Preprocessing(scale=(640, 320), bgr_to_rgb=False, std=(1.0, 1.0, 1.0)),
        "classes": ("person", "car", "sign"),
        "palette": ((1, 2, 3), (4, 5, 6), (7, 8, 9)),
    }
    return DetectorConfig(**(values | fields))


def shapes(architecture: DetectorConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(Detector(architecture).state_dict())


def infer(state: dict[str, Tensor], model: dict[str, Any] | None = None, **more: Any) -> Inference:
    return infer_config(state, config=None if model is None else Config({"model": model}), **more)


@pytest.mark.parametrize("masks", [True, False])
def test_detector_of_a_written_config_is_inferred_in_full(masks: bool) -> None:
    architecture = small(masks=masks)
    config = parse_config(format_config(architecture))
    meta = {"CLASSES": architecture.classes, "PALETTE": [list(c) for c in architecture.palette]}
    found = infer_config(shapes(architecture), config=config, meta=meta)
    assert found.architecture == architecture
    assert {fact.field for fact in found.assumed} <= {"backbone.conv.fbm_cfg.max_size"}
    assert not found.notes


@pytest.mark.parametrize("name", ["mask_rcnn", "faster_rcnn"])
@pytest.mark.parametrize("with_config", [True, False])
def test_detector_as_published_is_inferred(oracle: Path, name: str, with_config: bool) -> None:
    path = oracle / f"mmdet/{name}_r50_fpn_fdconv_kn64_c80_keys_mmdet2.28.1.json"
    model = json.loads(path.read_text())["cfg_model"] if with_config else None
    found = infer(key_list(path), model)
    assert found.architecture == DetectorConfig(
        backbone=ResNetConfig(conv=FDConvConfig(kernel_num=64)),
        mask_head=MaskHeadConfig() if name == "mask_rcnn" else None,
    )
    assumed = {fact.field for fact in found.assumed}
    found_fields = {fact.field for fact in found.found}
    by_config = {"rpn_head.strides", "test.rcnn.score_thr", "bbox_head.bbox_coder.stds"}
    assert by_config <= (found_fields if with_config else assumed)
    assert {
        "bbox_head.roi.output_size",
        "neck.out_channels",
        "bbox_head.num_classes",
    } <= found_fields
    assert ("test.rcnn.mask_thr_binary" in found_fields | assumed) == (name == "mask_rcnn")


def test_detector_of_an_mmdetection_3_config() -> None:
    """Preprocessing stands in the model, classes in dataset_meta, strides may be pairs."""
    architecture = small()
    config = parse_config(format_config(architecture))
    model = config.section("model")
    model["data_preprocessor"] = {
        "type": "DetDataPreprocessor",
        "mean": [123.675, 116.28, 103.53],
        "std": [1.0, 1.0, 1.0],
        "bgr_to_rgb": False,
        "pad_size_divisor": 32,
    }
    anchors = model["rpn_head"]["anchor_generator"]
    anchors["strides"] = [(s, s) for s in anchors["strides"]]
    steps = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (640, 320), "keep_ratio": True},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "PackDetInputs"},
    ]
    found = infer_config(
        shapes(architecture),
        config=Config({"model": model, "test_pipeline": steps}),
        meta={
            "dataset_meta": {"classes": architecture.classes, "palette": [*architecture.palette]}
        },
    )
    assert found.architecture == architecture
    assert not found.notes


def test_detector_of_an_older_config() -> None:
    """mmdetection before 2.?: test_cfg beside the model, nms_thr and max_num."""
    architecture = small(masks=False)
    state = shapes(architecture)
    model = parse_config(format_config(architecture)).section("model")
    del model["test_cfg"]
    old = {
        "rpn": {"nms_pre": 50, "max_num": 40, "nms_thr": 0.6, "min_bbox_size": 2},
        "rcnn": {"score_thr": 0.1, "nms": {"type": "nms", "iou_thr": 0.4}, "max_per_img": 30},
    }
    found = infer_config(state, config=Config({"model": model, "test_cfg": old}))
    assert found.architecture.test == architecture.test


def test_detector_settings_of_the_user_must_fit_the_weights() -> None:
    state = shapes(small())
    changes = {
        "neck.num_outs": 6,
        "rpn_head.ratios": (0.25, 1.0),
        "rpn_head.scales": (2.0, 4.0),
        "rpn_head.strides": (4, 8, 16, 32, 64, 128),
    }
    found = infer(state, overrides=changes | {"test.rcnn.score_thr": 0.3})
    assert found.architecture.test.rcnn.score_thr == 0.3
    with pytest.raises(CheckpointError, match="4 anchors at each position"):
        infer(state, overrides=changes | {"rpn_head.ratios": (1.0, 2.0, 3.0)})
    with pytest.raises(CheckpointError, match=r"bbox_head\.roi\.output_size.*says 7, but"):
        infer(state, overrides=changes | {"bbox_head.roi.output_size": 7})
    with pytest.raises(CheckpointError, match=r"score_thr: .*says '3'.*less than or equal to 1"):
        infer(state, overrides=changes | {"test.rcnn.score_thr": 3})
    with pytest.raises(CheckpointError, match=r"Did you mean test\.rcnn\.score_thr"):
        infer(state, overrides=changes | {"test.rcnn.score_threshold": 0.3})
    with pytest.raises(CheckpointError, match=r"rpn_head\.ratios is not known|4 anchors"):
        infer(state)


def changed(*path: str, to: Any) -> dict[str, Any]:
    model = parse_config(format_config(small())).section("model")
    place = model
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return model


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("type",), "CascadeRCNN", "is a CascadeRCNN by its config"),
        (("type",), "FasterRCNN", "is a FasterRCNN, and the weights have a mask head"),
        (("neck", "type"), "PAFPN", "neck is a PAFPN"),
        (("neck", "start_level"), 1, "start_level=1"),
        (("rpn_head", "anchor_generator", "center_offset"), 0.5, "center_offset=0.5"),
        (("rpn_head", "bbox_coder", "type"), "TBLRBBoxCoder", "is a TBLRBBoxCoder"),
        (("roi_head", "type"), "CascadeRoIHead", "is a CascadeRoIHead"),
        (("roi_head", "bbox_roi_extractor", "roi_layer", "type"), "RoIPool", "is a RoIPool"),
        (("roi_head", "bbox_roi_extractor", "roi_layer", "aligned"), False, "aligned=False"),
        (("roi_head", "mask_head", "upsample_cfg"), {"type": "carafe"}, "is a carafe"),
        (("test_cfg", "rcnn", "nms"), {"type": "soft_nms"}, "rcnn.nms is a soft_nms"),
        (
            ("test_cfg", "rcnn", "max_per_img"),
            -1,
            r"says '-1'.*greater than or equal to 1",
        ),
        (("test_cfg", "rpn", "nms", "class_agnostic"), True, "class_agnostic=True"),
        (("test_cfg", "rpn", "nms_across_levels"), True, "nms_across_levels=True"),
    ],
)
def test_detector_built_differently_is_refused(path: tuple, value: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        infer(shapes(small()), changed(*path, to=value))


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        ("neck.lateral_convs.0.bn.weight", (8,), r"neck.*expected an FPN without normalisation"),
        ("neck.fpn_convs.4.conv.weight", (8, 8, 3, 3), "without normalisation or extra"),
        ("rpn_head.rpn_cls.weight", (8, 7, 1, 1), "8 scores for 4 anchors"),
        ("roi_head.bbox_head.shared_convs.0.conv.weight", (8, 8, 3, 3), "shared_convs.0"),
        ("roi_head.bbox_head.fc_reg.weight", (8, 10), "8 deltas for 3 classes"),
        ("roi_head.bbox_head.shared_fcs.0.weight", (10, 8 * 24), "no square"),
        ("roi_head.mask_head.upsample.weight", (6, 6, 4, 4), "Expected 2×2"),
        ("roi_head.mask_head.conv_logits.weight", (2, 6, 1, 1), "2 masks for 3 classes"),
        ("roi_head.semantic_head.convs.0.weight", (2, 6, 1, 1), "has roi_head.semantic_head"),
        ("neck.lateral_convs.0.conv.weight", (8, 17, 1, 1), r"feature maps of \(17, 36, 72, 144\)"),
        ("rpn_head.rpn_conv.KSM_Global.fc.weight", (4, 8, 1, 1), "FDConv in the backbone only"),
    ],
)
def test_detector_of_other_weights_is_refused(key: str, shape: tuple[int, ...], says: str) -> None:
    architecture = small()
    state = shapes(architecture) | {key: torch.empty(shape, device="meta")}
    with pytest.raises(CheckpointError, match=says):
        infer(state, parse_config(format_config(architecture)).section("model"))


def test_detector_of_another_kind_is_refused() -> None:
    retina = {"backbone.layer1.0.conv1.weight": 1, "neck.x": 1, "bbox_head.retina_cls.weight": 1}
    with pytest.raises(CheckpointError, match=r"not one known here: .*backbone can be used"):
        infer({name: torch.empty(1) for name in retina})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    architecture = small()
    path = tmp_path_factory.mktemp("detector") / "mask.pth"
    save_checkpoint(path, Detector(architecture), architecture)
    return path


@torch.no_grad()
def test_detector_file_becomes_the_network_that_was_saved(saved: Path) -> None:
    torch.manual_seed(0)
    built = Detector(small()).eval()
    network = load_checkpoint(saved)
    assert isinstance(network, LoadedDetector)
    assert network.architecture == small()
    assert not network.training
    sources = {fact.field: fact.source for fact in network.inference.found}
    assert sources["classes"] == "checkpoint meta"
    assert sources["test.rpn.nms_pre"] == "config"
    x, size = torch.randn(1, 3, 64, 64), torch.tensor([[64.0, 60.0]])
    for ours, theirs in zip(network(x, size), built(x, size), strict=True):
        assert torch.equal(ours, theirs)


def test_detector_is_refused_where_only_a_segmentor_will_do(saved: Path) -> None:
    assert load_checkpoint(saved, overrides={"test.rcnn.score_thr": 0.2}).architecture.test.rcnn
    with pytest.raises(CheckpointError, match=r"mask\.pth is of a detector"):
        load_segmentor(saved)


def test_detector_is_inspected(saved: Path) -> None:
    report = inspect_checkpoint(saved)
    assert report.kind == "detector"
    assert report.detector == small()
    assert report.problem is None
    broken = inspect_checkpoint(saved, overrides={"neck.num_outs": 2})
    assert broken.detector is None
    assert "neck.num_outs" in (broken.problem or "")


def test_detector_config_has_lists_where_mmdetection_insists_on_them() -> None:
    model = parse_config(format_config(small())).section("model")
    assert model["neck"]["in_channels"] == [18, 36, 72, 144]
    assert isinstance(model["roi_head"]["bbox_roi_extractor"]["featmap_strides"], list)
