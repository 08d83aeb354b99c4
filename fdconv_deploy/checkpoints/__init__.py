"""Checkpoint files → networks, and back.

    from fdconv_deploy.checkpoints import load_checkpoint
    network = load_checkpoint("upernet_r50_fdconv.pth")

Nothing found in a file is ever executed. Names load on first use, so importing this
package is quick and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdconv_deploy.checkpoints.architecture import infer_architecture
    from fdconv_deploy.checkpoints.config_text import Config, parse_config, read_config
    from fdconv_deploy.checkpoints.conversion import (
        Conversion,
        convert_state_dict,
        equivalent_state_dict,
    )
    from fdconv_deploy.checkpoints.conversion_files import convert_checkpoint
    from fdconv_deploy.checkpoints.detector import infer_detector
    from fdconv_deploy.checkpoints.facts import Fact, Inference
    from fdconv_deploy.checkpoints.inspection import Report, inspect_checkpoint, report_on
    from fdconv_deploy.checkpoints.loading import (
        LoadedDetector,
        LoadedSegmentor,
        load_checkpoint,
        load_detector,
        load_segmentor,
    )
    from fdconv_deploy.checkpoints.mmdet_config import format_detector_config
    from fdconv_deploy.checkpoints.mmseg_config import format_config
    from fdconv_deploy.checkpoints.order import OrderReport, tell_order
    from fdconv_deploy.checkpoints.order_weights import order_of_weights
    from fdconv_deploy.checkpoints.reading import Checkpoint, read_checkpoint
    from fdconv_deploy.checkpoints.rendering import render
    from fdconv_deploy.checkpoints.saving import save_checkpoint
    from fdconv_deploy.checkpoints.verdict import export_command

_HOMES = {
    "Checkpoint": "reading",
    "Config": "config_text",
    "Conversion": "conversion",
    "Fact": "facts",
    "Inference": "facts",
    "LoadedDetector": "loading",
    "LoadedSegmentor": "loading",
    "OrderReport": "order",
    "Report": "inspection",
    "format_config": "mmseg_config",
    "format_detector_config": "mmdet_config",
    "convert_checkpoint": "conversion_files",
    "convert_state_dict": "conversion",
    "equivalent_state_dict": "conversion",
    "export_command": "verdict",
    "infer_architecture": "architecture",
    "infer_detector": "detector",
    "inspect_checkpoint": "inspection",
    "load_checkpoint": "loading",
    "load_detector": "loading",
    "load_segmentor": "loading",
    "order_of_weights": "order_weights",
    "parse_config": "config_text",
    "read_checkpoint": "reading",
    "read_config": "config_text",
    "render": "rendering",
    "report_on": "inspection",
    "save_checkpoint": "saving",
    "tell_order": "order",
}

__all__ = [
    "Checkpoint",
    "Config",
    "Conversion",
    "Fact",
    "Inference",
    "LoadedDetector",
    "LoadedSegmentor",
    "OrderReport",
    "Report",
    "convert_checkpoint",
    "convert_state_dict",
    "equivalent_state_dict",
    "export_command",
    "format_config",
    "format_detector_config",
    "infer_architecture",
    "infer_detector",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_detector",
    "load_segmentor",
    "order_of_weights",
    "parse_config",
    "read_checkpoint",
    "read_config",
    "render",
    "report_on",
    "save_checkpoint",
    "tell_order",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
