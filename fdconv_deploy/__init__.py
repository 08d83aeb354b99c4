"""What an FDConv network is, and how a bundle of one runs.

FDConv: "Frequency Dynamic Convolution for Dense Image Prediction" (CVPR 2025,
arXiv 2503.18783).
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fdconv_deploy.version import __version__

if TYPE_CHECKING:
    from fdconv_deploy.checkpoints import load_checkpoint
    from fdconv_deploy.export import export_checkpoint, export_module
    from fdconv_deploy.runtime import open_session


# ONNX Runtime (since 1.29) reports what it runs to its maker, from its import on, and looks that
# host up. Not unasked for: whoever sets the variable, also to 0, decides.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Imported when first asked for: torch takes seconds, and a service needs none of it.
_HOMES = {
    "export_checkpoint": "export",
    "export_module": "export",
    "load_checkpoint": "checkpoints",
    "open_session": "runtime",
}

__all__ = ["__version__", "export_checkpoint", "export_module", "load_checkpoint", "open_session"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
