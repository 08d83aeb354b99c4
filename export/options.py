"""What an export refuses before anything is loaded. Imports neither torch nor onnx."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, cast, get_args

from fdconv_deploy.errors import ExportError

PrecisionName = Literal["fp32", "fp16", "int8"]
Activations = Literal["unsigned", "signed"]

# What is not kept when exceeded. fp32 and fp16: the largest error, relative to the largest
# value. int8: the share of positions whose class changes, where a class is chosen.
TOLERANCES: dict[PrecisionName, float] = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.1}
LARGEST_SIDE = 16384


def check_size(size: tuple[int, int]) -> None:
    """Height and width in pixels.

    Raises:
        ExportError: out of range.
    """
    if min(size) < 1 or max(size) > LARGEST_SIDE:
        raise ExportError(
            f"height and width must be 1 to {LARGEST_SIDE} pixels, got {size[0]}x{size[1]}."
        )


def batch_sizes(batches: Iterable[int]) -> list[int]:
    """Each batch size once, ascending.

    Raises:
        ExportError: there is none, or one is below 1.
    """
    given = list(batches)
    unique = sorted(set(given))
    if not unique or unique[0] < 1:
        raise ExportError(f"batch sizes must be 1 or more, got {given}.")
    return unique


def check_precision(
    precision: str,
    *,
    tolerance: float | None,
    keep_fp32: Sequence[str],
    calibration: Sequence[object],
    activations: str,
    evaluation: Sequence[object] = (),
) -> float:
    """The tolerance to go by, when the rest fits together.

    Raises:
        ExportError: it does not.
    """
    if precision not in get_args(PrecisionName):
        raise ExportError(f"--precision is fp32, fp16 or int8, not {precision!r}.")
    named = cast(PrecisionName, precision)
    if activations not in get_args(Activations):
        raise ExportError(f"--activations is unsigned or signed, not {activations!r}.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ExportError(
            f"--tolerance is a share, 0 or more, e.g. {TOLERANCES[named]:g}; got {tolerance:g}."
        )
    if precision == "int8" and not len(calibration):
        raise ExportError(
            "int8 needs images to learn the activations' ranges from: give a folder of some "
            "hundred pictures of the kind the network will see, --calibrate FOLDER."
        )
    if precision != "int8" and len(calibration):
        raise ExportError(
            f"calibration images are for int8, and --precision is {precision}. Say --precision "
            "int8, or leave --calibrate out."
        )
    if precision == "fp32" and keep_fp32:
        raise ExportError(
            "--keep-fp32 names what stays float32 in an fp16 or int8 bundle; in fp32 all does. "
            "Say --precision, or leave it out."
        )
    if precision == "fp32" and len(evaluation):
        raise ExportError(
            "--evaluate compares an fp16 or int8 bundle's answers with float32's; in fp32 they "
            "are the same. Say --precision, or leave it out."
        )
    return TOLERANCES[named] if tolerance is None else tolerance
