"""Every tolerance that a graph or an engine is judged by, and how it is. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fdconv_deploy.runtime.manifest import OutputParity

Precision = Literal["fp32", "fp16", "int8"]
Outcome = Literal["equal", "cannot tell", "differs"]

# What is kept unless the caller gives a tolerance. fp32, fp16: the largest error as a share of the
# output's largest value, in fp16 of each layer's output too. int8: the share of positions of
# another class, where a class is chosen.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.1}
# The error of a layer that sees the network's own input, wherever float32 itself does not cost a
# tenth of that.
LAYER_TOLERANCE = 1e-5
# Two float32 computations may be this many times as far from each other as one is from exact.
ROUNDING_MULTIPLE = 10.0
# A detector's mask is a sigmoid of sums over a hundred thousand numbers: ten times a score's error.
MASK_MULTIPLE = 10.0
# TensorRT's kernels round otherwise than ONNX Runtime's; TF32 keeps ten bits of a product.
ENGINE_MULTIPLE = 2.0
TF32_TOLERANCE = 2e-2
# An .onnx file beside the graph of the bundle it was written from, as a share of the largest value.
# In the bundle's own opset, ONNX Runtime computes the same bits. In another, it fuses and rounds
# other operators: by float16's unit, or to another of eight bits' steps.
ONNX_FILE_TOLERANCES: dict[Precision, float] = {"fp32": 1e-5, "fp16": 1e-3, "int8": 1e-2}


def counts_classes(parity: OutputParity, precision: Precision) -> bool:
    """Whether the tolerance of an output is a share of positions of another class."""
    return precision == "int8" and parity.argmax_agreement is not None


def measured(parity: OutputParity, precision: Precision) -> float:
    """The figure of an output that its tolerance is about."""
    agreement = parity.argmax_agreement
    return parity.max_rel if precision != "int8" or agreement is None else 1 - agreement


def engine_tolerance(precision: Precision, *, tf32: bool) -> float:
    """How far an engine's answers may be from ONNX Runtime's."""
    allowed = ENGINE_MULTIPLE * TOLERANCES[precision]
    return max(allowed, TF32_TOLERANCE) if tf32 else allowed


def decide(
    error: float, rounding: Callable[[], float], limit: float, tolerance: float
) -> tuple[Outcome, float | None]:
    """Judge one error.

    Args:
        error: of the graph.
        rounding: measures what float32 itself costs on this input; called only if need be.
        limit: what the error may be at least.
        tolerance: where float32 needs more than this, the input cannot tell.

    Returns:
        The outcome, and float32's cost if it was measured.
    """
    if error <= limit:
        return "equal", None
    own = rounding()
    if not ROUNDING_MULTIPLE * own <= tolerance:
        return "cannot tell", own
    return "equal" if error <= ROUNDING_MULTIPLE * own else "differs", own
