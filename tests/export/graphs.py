"""Running exported files as a user's program would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray


def run_file(path: Path, x: NDArray) -> list[NDArray]:
    """Every output, in stock ONNX Runtime with nothing registered."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert entry.type == "tensor(float)"
    return session.run(None, {entry.name: x})


def relative(actual: NDArray, expected: NDArray) -> float:
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(np.float64) - expected).max()
    return float(difference / (np.abs(expected).max() or 1))
