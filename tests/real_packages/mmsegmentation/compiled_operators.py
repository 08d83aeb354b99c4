"""Let mmsegmentation be imported beside mmcv-lite, which has no compiled operators.

``mmcv.ops`` looks up each compiled operator by name when it is imported, and mmsegmentation
imports it everywhere. No network made here calls one: here they are declared, and raise.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any


def declare() -> None:
    """Declare mmcv's compiled operators; to be called before mmseg is imported."""

    def operator(name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # what Python itself asks of a module
            raise AttributeError(name)

        def raising(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"mmcv-lite has no compiled operator {name}")

        return raising

    module = types.ModuleType("mmcv._ext")
    module.__getattr__ = operator  # type: ignore[method-assign]
    # Without a loader, mmengine still finds mmcv to be the one without compiled operators.
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, loader=None)
    sys.modules.setdefault("mmcv._ext", module)
