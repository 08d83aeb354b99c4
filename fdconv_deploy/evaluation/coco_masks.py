"""An annotation's segmentation as run lengths: what ``pycocotools`` takes, as it takes it.

pycocotools is C below, which trusts its input: run lengths that do not add up to their size keep
its overlap from ever ending, and a coordinate that is no number makes it ask for gigabytes. So
the values are looked at here, and only what it can take is given to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.coco_rle import MAX_PIXELS, Rle, compress, decompress

# pycocotools walks along a polygon in fifths of a pixel and holds every step, 16 bytes of it.
_STEPS = 5
_MOST_STEPS = 1 << 24

POLYGONS = "[[x1, y1, x2, y2, x3, y3, …], …], polygons of three points or more"
RUN_LENGTHS = "run lengths that add up to their size, {'size': [height, width], 'counts': …}"


class NotAMaskError(ValueError):
    """A segmentation that pycocotools cannot take.

    The message says what it is, as a phrase; ``expected`` what was expected.
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found)
        self.expected = expected


def coco_mask(segmentation: Any, height: int, width: int) -> Rle:
    """The mask that an annotation's ``segmentation`` stands for.

    Args:
        segmentation: as it stands in the JSON: polygons, or run lengths, compressed or not.
        height: the image's, which polygons are drawn in. Run lengths have a size of their own.
        width: likewise.

    Raises:
        NotAMaskError: pycocotools cannot take it, or would not come back from it.
    """
    if isinstance(segmentation, dict):
        return _run_lengths(segmentation)
    if not isinstance(segmentation, list):
        raise NotAMaskError(f"it is {_kind(segmentation)}", f"{POLYGONS}, or {RUN_LENGTHS}")
    if not segmentation:
        raise NotAMaskError("an empty list", POLYGONS)
    if isinstance(segmentation[0], dict):
        return _merged([_listed_run_lengths(entry) for entry in segmentation])
    return _polygons(segmentation, height, width)


def box_mask(box: NDArray[np.float64], height: int, width: int) -> Rle:
    """The mask of all pixels of a box [x, y, width, height] that lie within the image."""
    from pycocotools import mask

    low, high = box[:2], box[:2] + box[2:]
    inside = np.clip(np.stack([np.minimum(low, high), np.maximum(low, high)]), 0, [width, height])
    within = np.concatenate([inside[0], inside[1] - inside[0]])
    return _text(mask.frPyObjects(within[None], height, width)[0])


def mask_box(rle: Rle) -> list[float]:
    """The box [x, y, width, height] around a mask, a pixel away from it; all 0 around none.

    A pixel away, since boxes end between pixels, and masks do not.
    """
    from pycocotools import mask

    if not decompress(rle["counts"])[1::2].any():
        return [0.0] * 4
    left, top, width, height = mask.toBbox(rle).tolist()
    return [left - 1, top - 1, width + 2, height + 2]


def _run_lengths(told: dict[str, Any]) -> Rle:
    counts = told.get("counts")
    size = _size(told)
    if isinstance(counts, str):
        try:
            lengths = decompress(counts)
        except ValueError:
            raise NotAMaskError(
                "run lengths of other characters than COCO's", RUN_LENGTHS
            ) from None
    else:
        lengths = _counts(counts)
    return _checked(lengths, size)


def _listed_run_lengths(told: Any) -> Rle:
    """One of a list of run lengths, where pycocotools takes uncompressed ones alone."""
    if not isinstance(told, dict):
        raise NotAMaskError("a list of run lengths and other things", RUN_LENGTHS)
    size = _size(told)
    if isinstance(told.get("counts"), str):
        raise NotAMaskError("a list of compressed run lengths", RUN_LENGTHS)
    return _checked(_counts(told.get("counts")), size)


def _size(told: dict[str, Any]) -> tuple[int, int]:
    size = told.get("size")
    if size is None:
        raise NotAMaskError("run lengths without a size", RUN_LENGTHS)
    sides = size[:2] if isinstance(size, list) else []
    # Fractions are cut off, as pycocotools does it; 20.0 is what pandas makes of 20.
    if len(sides) < 2 or not all(
        isinstance(side, int | float) and 1 <= side <= MAX_PIXELS for side in sides
    ):
        raise NotAMaskError("run lengths whose size is not [height, width]", RUN_LENGTHS)
    height, width = map(int, sides)
    if height * width > MAX_PIXELS:
        raise NotAMaskError("run lengths of more pixels than any image has", RUN_LENGTHS)
    return height, width


def _counts(told: Any) -> NDArray[np.int64]:
    if told is None:
        raise NotAMaskError("run lengths without counts", RUN_LENGTHS)
    if not isinstance(told, list):
        raise NotAMaskError("run lengths whose counts are neither text nor a list", RUN_LENGTHS)
    try:
        with np.errstate(invalid="raise"):
            lengths = np.array(told, np.uint32)  # fractions are cut off, as pycocotools does it
    except (ValueError, TypeError, OverflowError, FloatingPointError):
        lengths = np.zeros((0, 0), np.uint32)
    if lengths.ndim != 1:
        raise NotAMaskError("run lengths whose counts are not numbers from 0 on", RUN_LENGTHS)
    return lengths.astype(np.int64)


def _checked(lengths: NDArray[np.int64], size: tuple[int, int]) -> Rle:
    pixels = size[0] * size[1]
    if not len(lengths) or lengths.min() < 0 or lengths.max() > pixels or lengths.sum() != pixels:
        raise NotAMaskError("run lengths that do not add up to their size", RUN_LENGTHS)
    return {"size": list(size), "counts": compress(lengths)}


def _polygons(told: list[Any], height: int, width: int) -> Rle:
    first = told[0]
    if isinstance(first, int | float):
        raise NotAMaskError("one list of numbers, not a list of polygons", POLYGONS)
    # The first one alone decides how pycocotools reads all of them.
    if not isinstance(first, list) or len(first) < 4:
        raise NotAMaskError("a list whose first part is not a polygon", POLYGONS)
    if len(first) == 4:
        raise NotAMaskError("a polygon of two points", POLYGONS)
    for polygon in told:
        _check_polygon(polygon)
    from pycocotools import mask

    return _merged([_text(made) for made in mask.frPyObjects(told, height, width)])


def _check_polygon(polygon: Any) -> None:
    try:
        values = np.array(polygon, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise NotAMaskError("a polygon that is not a list of numbers", POLYGONS) from None
    if values.ndim != 1:
        raise NotAMaskError("a polygon nested deeper than a list of numbers", POLYGONS)
    if not np.isfinite(values).all():
        raise NotAMaskError("a polygon with coordinates that are not finite", POLYGONS)
    farthest = np.abs(values).max(initial=0)
    if farthest * _STEPS >= 1 << 30:
        raise NotAMaskError("a polygon millions of pixels away", POLYGONS)
    if farthest * _STEPS * len(values) > _MOST_STEPS:  # seldom, and then it is worth a sum
        points = values[: len(values) // 2 * 2].reshape(-1, 2)
        if _STEPS * np.abs(points - np.roll(points, 1, 0)).max(1).sum() > _MOST_STEPS:
            raise NotAMaskError("a polygon millions of pixels long", POLYGONS)


def _merged(parts: list[Rle]) -> Rle:
    if len(parts) == 1:
        return parts[0]
    from pycocotools import mask

    if any(part["size"] != parts[0]["size"] for part in parts):
        raise NotAMaskError("a list of run lengths of several sizes", RUN_LENGTHS)
    return _text(mask.merge(parts))


def _text(made: dict[str, Any]) -> Rle:
    return {"size": [int(side) for side in made["size"]], "counts": made["counts"].decode("ascii")}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "text" if isinstance(value, str) else "a number"
