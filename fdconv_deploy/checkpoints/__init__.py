"""Checkpoint files → networks, and back.

    from fdconv_deploy.checkpoints import load_checkpoint
    network = load_checkpoint("upernet_r50_fdconv.pth")

Nothing found in a file is ever executed. Names load on first use, so importing this
package is quick and does not import torch.
"""
# ruff: noqa: F401 - the names are what type checkers see; __getattr__ gives them

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdconv_deploy.checkpoints.config_parser import Config, parse_config, read_config
    from fdconv_deploy.checkpoints.config_writer import format_config
    from fdconv_deploy.checkpoints.convert import (
        Conversion,
        convert_checkpoint,
        convert_state_dict,
        equivalent_state_dict,
    )
    from fdconv_deploy.checkpoints.evidence import Inference, Setting
    from fdconv_deploy.checkpoints.frequency_order import OrderReport, detect_order
    from fdconv_deploy.checkpoints.frequency_order.from_weights import order_of_weights
    from fdconv_deploy.checkpoints.infer_detector import infer_detector_config
    from fdconv_deploy.checkpoints.infer_segmentor import infer_segmentor_config
    from fdconv_deploy.checkpoints.inspect import (
        Report,
        export_command,
        inspect_checkpoint,
        render,
        report_on,
    )
    from fdconv_deploy.checkpoints.loading import (
        LoadedDetector,
        LoadedSegmentor,
        load_checkpoint,
        load_detector,
        load_segmentor,
    )
    from fdconv_deploy.checkpoints.reading import Checkpoint, read_checkpoint
    from fdconv_deploy.checkpoints.save import save_checkpoint

_NAMES = {
    "config_parser": "Config parse_config read_config",
    "config_writer": "format_config",
    "convert": "Conversion convert_checkpoint convert_state_dict equivalent_state_dict",
    "evidence": "Inference Setting",
    "frequency_order": "OrderReport detect_order",
    "frequency_order.from_weights": "order_of_weights",
    "infer_detector": "infer_detector_config",
    "infer_segmentor": "infer_segmentor_config",
    "inspect": "Report export_command inspect_checkpoint render report_on",
    "loading": "LoadedDetector LoadedSegmentor load_checkpoint load_detector load_segmentor",
    "reading": "Checkpoint read_checkpoint",
    "save": "save_checkpoint",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
