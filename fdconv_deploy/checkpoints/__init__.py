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
    from fdconv_deploy.checkpoints.convert import convert_checkpoint, convert_state_dict
    from fdconv_deploy.checkpoints.inspect import inspect_checkpoint
    from fdconv_deploy.checkpoints.loading import (
        LoadedDetector,
        LoadedSegmentor,
        load_checkpoint,
        load_segmentor,
    )
    from fdconv_deploy.checkpoints.reading import read_checkpoint
    from fdconv_deploy.checkpoints.save import save_checkpoint

_NAMES = {
    "convert": "convert_checkpoint convert_state_dict",
    "inspect": "inspect_checkpoint",
    "loading": "LoadedDetector LoadedSegmentor load_checkpoint load_segmentor",
    "reading": "read_checkpoint",
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
