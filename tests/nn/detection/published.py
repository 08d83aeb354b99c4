"""ONNX's own test cases of an operator, from the installed onnx package."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def node_case(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, export: Callable[[], None]
) -> tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]:
    """A case's attributes, inputs and outputs: what it hands to onnx's ``expect``."""
    seen: list[dict[str, Any]] = []

    def note(node: Any, inputs: Any, outputs: Any, name: str) -> None:
        seen.append({"node": node, "inputs": inputs, "outputs": outputs})

    monkeypatch.setattr(module, "expect", note)
    export()
    (case,) = seen
    attributes = {a.name: a for a in case["node"].attribute}
    return attributes, case["inputs"], case["outputs"]
