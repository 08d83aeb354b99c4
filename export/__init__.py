"""Network -> bundle: a static-shape ONNX graph with FDConv layers as ``fdconv`` nodes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdconv_deploy.export.api import export_checkpoint, export_module, export_network
    from fdconv_deploy.export.options import ExportOptions
    from fdconv_deploy.export.targets.onnx_file import OnnxFile, export_onnx
    from fdconv_deploy.export.targets.triton_repository import export_triton
    from fdconv_deploy.export.targets.ultralytics import export_ultralytics
    from fdconv_deploy.export.targets.web_page import export_web

__all__ = [
    "ExportOptions",
    "OnnxFile",
    "export_checkpoint",
    "export_module",
    "export_network",
    "export_onnx",
    "export_triton",
    "export_ultralytics",
    "export_web",
]

_HOMES = {
    "ExportOptions": "options",
    "OnnxFile": "targets.onnx_file",
    "export_onnx": "targets.onnx_file",
    "export_triton": "targets.triton_repository",
    "export_ultralytics": "targets.ultralytics",
    "export_web": "targets.web_page",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; importing the package should not.
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
