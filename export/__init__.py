"""Network -> bundle: a static-shape ONNX graph with FDConv layers as ``fdconv`` nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.pipeline import export_checkpoint, export_module

__all__ = ["export_checkpoint", "export_module"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `import export` should not.
    if name in __all__:
        from export import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
