"""Packaged pictures: the default inputs of export's comparisons and of ``fdconv bench``.

Six street scenes of 384x768 pixels, drawn by ``examples/streets/scenes.py`` (seeds 7,000,000 to
7,000,005): of training's range of seeds, at another size. They compare and time networks; they
score none.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.runtime.images import read_image

__all__ = ["COUNT", "sample_image"]

COUNT = 6


def sample_image(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A packaged picture, cropped to the aspect ratio of ``size`` and resized to it.

    Args:
        number: which picture, from 0. Past the last one the pictures come again, mirrored, and
            after that cropped elsewhere: the same number always gives the same pixels.
        size: height and width in pixels.

    Returns:
        ``(height, width, 3)`` uint8, RGB.
    """
    picture: NDArray[Any] = _picture(number % COUNT)
    again = number // COUNT
    if again % 2:
        picture = picture[:, ::-1]
    height, width = size
    rows, columns = picture.shape[:2]
    scale = min(rows / height, columns / width)
    crop = max(1, round(height * scale)), max(1, round(width * scale))
    # Of a crop that leaves much out, another part each time: the golden ratio never repeats one.
    along = (0.5 + 0.6180339887 * (number // (2 * COUNT))) % 1.0
    top, left = (
        round((whole - part) * along) for whole, part in zip((rows, columns), crop, strict=True)
    )
    cut = np.ascontiguousarray(picture[top : top + crop[0], left : left + crop[1]])
    shrinks = crop[0] > height or crop[1] > width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(cut, (width, height), interpolation=how), np.uint8)


@cache
def _picture(number: int) -> NDArray[np.uint8]:
    return read_image(Path(__file__).parent / f"{number}.jpg")
