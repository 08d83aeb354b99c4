"""Network -> bundle: a static-shape ONNX graph with FDConv layers as ``fdconv`` nodes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.pipeline import export_checkpoint, export_module
    from export.ultralytics import export_ultralytics

__all__ = ["export_checkpoint", "export_module", "export_ultralytics"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `import export` should not.
    if name in __all__:
        module = "ultralytics" if name == "export_ultralytics" else "pipeline"
        return getattr(importlib.import_module(f"export.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
