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
    from fdconv_deploy.checkpoints.config_parser import Config, parse_config, read_config
    from fdconv_deploy.checkpoints.config_writer import format_config
    from fdconv_deploy.checkpoints.convert import (
        Conversion,
        convert_state_dict,
        equivalent_state_dict,
    )
    from fdconv_deploy.checkpoints.convert_file import convert_checkpoint
    from fdconv_deploy.checkpoints.evidence import Inference, Setting
    from fdconv_deploy.checkpoints.exportability import export_command
    from fdconv_deploy.checkpoints.frequency_order import OrderReport, tell_order
    from fdconv_deploy.checkpoints.frequency_order.from_weights import order_of_weights
    from fdconv_deploy.checkpoints.infer_detector import infer_detector_config
    from fdconv_deploy.checkpoints.infer_segmentor import infer_segmentor_config
    from fdconv_deploy.checkpoints.inspect import Report, inspect_checkpoint, report_on
    from fdconv_deploy.checkpoints.inspect_report import render
    from fdconv_deploy.checkpoints.loading import (
        LoadedDetector,
        LoadedSegmentor,
        load_checkpoint,
        load_detector,
        load_segmentor,
    )
    from fdconv_deploy.checkpoints.reading import Checkpoint, read_checkpoint
    from fdconv_deploy.checkpoints.save import save_checkpoint

_HOMES = {
    "Checkpoint": "reading",
    "Config": "config_parser",
    "Conversion": "convert",
    "Inference": "evidence",
    "LoadedDetector": "loading",
    "LoadedSegmentor": "loading",
    "OrderReport": "frequency_order",
    "Report": "inspect",
    "Setting": "evidence",
    "format_config": "config_writer",
    "convert_checkpoint": "convert_file",
    "convert_state_dict": "convert",
    "equivalent_state_dict": "convert",
    "export_command": "exportability",
    "infer_segmentor_config": "infer_segmentor",
    "infer_detector_config": "infer_detector",
    "inspect_checkpoint": "inspect",
    "load_checkpoint": "loading",
    "load_detector": "loading",
    "load_segmentor": "loading",
    "order_of_weights": "frequency_order.from_weights",
    "parse_config": "config_parser",
    "read_checkpoint": "reading",
    "read_config": "config_parser",
    "render": "inspect_report",
    "report_on": "inspect",
    "save_checkpoint": "save",
    "tell_order": "frequency_order",
}

__all__ = [
    "Checkpoint",
    "Config",
    "Conversion",
    "Inference",
    "LoadedDetector",
    "LoadedSegmentor",
    "OrderReport",
    "Report",
    "Setting",
    "convert_checkpoint",
    "convert_state_dict",
    "equivalent_state_dict",
    "export_command",
    "format_config",
    "infer_detector_config",
    "infer_segmentor_config",
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
