"""An instance's mask at the image's size, out of the small one its network gives.

As mmdetection pastes it when testing: the box is divided into the mask's cells, whose values
lie at their centres and are 0 outside; a pixel's value is interpolated bilinearly at its own
centre, and the pixel belongs to the instance from a threshold on. (It is ``grid_sample``
without ``align_corners``, in float32.) On a GPU mmdetection samples the whole image so, on a
CPU the box and a pixel around it, which differs only for thresholds below 0.5; this is the
former. A box without area has an empty mask here; there, it paints stripes.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bound=np.generic)
Probabilities = npt.NDArray[np.float32]


class Pasted(NamedTuple):
    """A mask's part that may be True: ``pixels`` (h, w) bool at (``top``, ``left``)."""

    top: int
    left: int
    pixels: npt.NDArray[np.bool_]

    def of(self, canvas: npt.NDArray[T]) -> npt.NDArray[T]:
        """A view of its part of an image (H, W) or (H, W, C)."""
        height, width = self.pixels.shape
        return canvas[self.top : self.top + height, self.left : self.left + width]


def paste(
    mask: Probabilities,
    box: npt.NDArray[np.float32],
    size: tuple[int, int],
    threshold: float,
) -> Pasted:
    """The pixels of one instance.

    Args:
        mask: (h, w) float32, 0 to 1.
        box: (4,) float32 x1, y1, x2, y2 in pixels of the image.
        size: (H, W) of the image.
        threshold: a pixel belongs to the instance from this probability on; mmdetection's
            ``mask_thr_binary``. At 0 or less, every pixel does.
    """
    if threshold <= 0:
        return Pasted(0, 0, np.ones(size, np.bool_))
    top, rows = _along(box[1], box[3], mask.shape[0], size[0])
    left, columns = _along(box[0], box[2], mask.shape[1], size[1])
    values = rows @ mask.astype(np.float32, copy=False) @ columns.T
    return Pasted(top, left, values >= np.float32(threshold))


def _along(
    start: np.float32, stop: np.float32, cells: int, length: int
) -> tuple[int, npt.NDArray[np.float32]]:
    """The first pixel that cells of a box reach, and each pixel's shares of them (n, cells)."""
    if not stop > start:
        return 0, np.zeros((0, cells), np.float32)
    reach = (float(stop) - float(start)) / cells / 2 + 1
    first = min(max(math.floor(start - reach), 0), length)
    last = max(min(math.ceil(stop + reach), length), first)
    # Each step as torch takes it in float32.
    centres = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    place = (centres - start) / (stop - start) * np.float32(2) - np.float32(1)
    place = ((place + np.float32(1)) * np.float32(cells) - np.float32(1)) / np.float32(2)
    lower = np.floor(place)
    shares = np.zeros((len(place), cells + 2), np.float32)
    # A cell before the first and one behind the last, of value 0, are cut off again.
    index = np.clip(lower.astype(np.int64) + 1, 0, cells)
    beyond = (lower < -1) | (lower >= cells)
    pixels = np.arange(len(place))
    shares[pixels, index] = np.where(beyond, 0, 1 - (place - lower))
    shares[pixels, index + 1] = np.where(beyond, 0, place - lower)
    return first, shares[:, 1:-1]
