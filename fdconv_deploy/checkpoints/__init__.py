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
    from fdconv_deploy.checkpoints.reading import Checkpoint, read_checkpoint
    from fdconv_deploy.checkpoints.saving import save_checkpoint

_HOMES = {
    "Checkpoint": "reading",
    "read_checkpoint": "reading",
    "save_checkpoint": "saving",
}

__all__ = ["Checkpoint", "read_checkpoint", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
