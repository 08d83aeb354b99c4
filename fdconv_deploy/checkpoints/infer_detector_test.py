"""How a detector is tested: what no weight tells, of both stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.evidence import UNSET, Evidence, stated, type_of
from fdconv_deploy.config import RCNNTestConfig, RPNTestConfig
from fdconv_deploy.errors import CheckpointError


def infer_rpn_test(config: Config, evidence: Evidence) -> RPNTestConfig:
    """``test_cfg.rpn``, of the model or, in older files, of the config."""
    section = _section(config, "rpn")
    suppression = _suppression("rpn", section)
    if stated(section, "nms_across_levels") not in (UNSET, False):
        raise CheckpointError(
            "The config's test_cfg.rpn has nms_across_levels=True. Expected suppression level by "
            "level; the other is not supported."
        )

    def settle(name: str, kind: Any, **knowledge: Any) -> Any:
        default = RPNTestConfig.model_fields[name].default
        return evidence.settle(f"test.rpn.{name}", kind, default=default, **knowledge)

    return RPNTestConfig(
        nms_pre=settle("nms_pre", int, config=stated(section, "nms_pre"), **_ABOVE_0),
        max_per_img=settle(
            "max_per_img",
            int,
            config=stated(section, "max_per_img", "max_num", "nms_post"),
            **_ABOVE_0,
        ),
        nms_iou_threshold=settle(
            "nms_iou_threshold", float, config=_threshold(section, suppression), **_SHARE
        ),
        min_bbox_size=settle("min_bbox_size", float, config=stated(section, "min_bbox_size")),
    )


def infer_rcnn_test(config: Config, evidence: Evidence, *, masks: bool) -> RCNNTestConfig:
    """``test_cfg.rcnn``, of the model, the RoI head or, in older files, of the config."""
    section = _section(config, "rcnn") or config.section("model", "roi_head", "test_cfg")
    suppression = _suppression("rcnn", section)

    def settle(name: str, kind: Any, **knowledge: Any) -> Any:
        default = RCNNTestConfig.model_fields[name].default
        return evidence.settle(f"test.rcnn.{name}", kind, default=default, **knowledge)

    return RCNNTestConfig(
        score_thr=settle("score_thr", float, config=stated(section, "score_thr"), **_SHARE),
        nms_iou_threshold=settle(
            "nms_iou_threshold", float, config=_threshold(section, suppression), **_SHARE
        ),
        max_per_img=settle("max_per_img", int, config=stated(section, "max_per_img"), **_ABOVE_0),
        mask_thr_binary=settle(
            "mask_thr_binary",
            float,
            config=stated(section, "mask_thr_binary"),
            matters=masks,
            **_SHARE,
        ),
    )


_ABOVE_0 = {
    "accepts": lambda value: value > 0,
    "tells": "a graph has a fixed number of places, 1 or more",
}
_SHARE = {"accepts": lambda value: 0 <= value <= 1, "tells": "it is a share, 0 to 1"}


def _section(config: Config, stage: str) -> dict[str, Any]:
    return config.section("model", "test_cfg", stage) or config.section("test_cfg", stage)


def _suppression(stage: str, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``nms`` entry, which must be plain suppression, group by group."""
    nms = section.get("nms")
    nms = nms if isinstance(nms, Mapping) else {}
    kind = type_of(nms)
    across = stated(nms, "class_agnostic") not in (UNSET, False)
    if kind not in ("", "nms") or across:
        found = f"nms type {kind}" if kind not in ("", "nms") else "class_agnostic=True"
        raise CheckpointError(
            f"The config's test_cfg.{stage} has {found}. Expected plain nms of each level or "
            "class; others are not supported yet."
        )
    return nms


def _threshold(section: Mapping[str, Any], suppression: Mapping[str, Any]) -> Any:
    value = stated(suppression, "iou_threshold", "iou_thr")
    return stated(section, "nms_thr") if value is UNSET else value
