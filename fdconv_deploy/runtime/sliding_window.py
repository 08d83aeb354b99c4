"""The published ``slide`` mode: a crop moved over the image, overlapping logits averaged.

As mmsegmentation's slide_inference: the grid has max(size − crop + stride − 1, 0) // stride
+ 1 windows along an axis, the last ones moved back inside the image; each window's logits
are resized to the crop; where windows overlap their logits are averaged. Only the windows
that the rows at hand need are kept, and at the head's resolution, so memory grows with the
image's width but not with its height.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import HeadConfig, Preprocessing, TestMode
from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime.postprocessing import (
    ArrayRows,
    Logits,
    Taps,
    View,
    bilinear,
)
from fdconv_deploy.runtime.preprocessing import Pixels, normalise

Run = Callable[[Logits], Logits]
"""(N, C, H, W) float32, normalised, for any N -> logits (N, classes, h, w) float32."""


class Window(NamedTuple):
    """A crop's place in the image, in pixels; at its border smaller than the crop may be."""

    top: int
    left: int
    bottom: int
    right: int


def axis_starts(size: int, crop: int, stride: int) -> list[int]:
    """Where the windows along one axis begin."""
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, size) - crop, 0) for i in range(count)]


def windows_of(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> list[Window]:
    """The windows over an image of ``size``, row by row; together they cover every pixel."""
    return [
        Window(top, left, min(top + crop[0], size[0]), min(left + crop[1], size[1]))
        for top in axis_starts(size[0], crop[0], stride[0])
        for left in axis_starts(size[1], crop[1], stride[1])
    ]


def slide_stride(test: TestMode, crop: tuple[int, int]) -> tuple[int, int]:
    """The stride to slide by; ``BundleError`` if none is recorded, or it leaves gaps."""
    if test.stride is None:
        tested = "in slide mode" if test.mode == "slide" else "on whole images"
        raise BundleError(
            f"The network was tested {tested}, and its bundle records no stride to slide by. Leave "
            "the mode out, or export it again with a config, or --set test.stride=[…], that gives "
            "one."
        )
    if any(s > c for s, c in zip(test.stride, crop, strict=True)):
        raise BundleError(
            f"The stride {test.stride} of the network's slide mode must be at most the bundle's "
            f"input size {crop}, or pixels would lie between windows. Export it at "
            f"the network's crop size{f', {test.crop_size}' if test.crop_size else ''}."
        )
    return test.stride


@dataclass(eq=False)
class SlidingRows:
    """The averaged logits of a slid crop, row by row (a ``LogitRows``).

    ``image`` (H, W, C) is already resized as published. One smaller than ``crop``, (H, W) of the
    input, is padded to it with the mean colour, at the bottom and right. ``stride`` is (vertical,
    horizontal) pixels from one window to the next; ``run`` is called with at most ``batch`` crops.
    """

    image: Pixels
    preprocessing: Preprocessing
    crop: tuple[int, int]
    stride: tuple[int, int]
    run: Run
    head: HeadConfig
    batch: int

    def __post_init__(self) -> None:
        """Lay the windows over the image."""
        self.height, self.width = self.image.shape[:2]
        self.classes = self.head.outputs
        self._windows = windows_of((self.height, self.width), self.crop, self.stride)
        self._next = 0  # the first window not yet run
        self._answers: dict[int, Logits] = {}
        # How many windows cover a pixel: windows form a grid, so it is a product.
        self._down, self._across = map(_cover, self.image.shape[:2], self.crop, self.stride)

    @property
    def padded(self) -> bool:
        """Whether the image is smaller than the crop, and so was padded."""
        return self.height < self.crop[0] or self.width < self.crop[1]

    def rows(self, start: int, stop: int) -> Logits:
        """Rows ``start`` to ``stop``, as (rows, width, classes) float32."""
        total = np.zeros((stop - start, self.width, self.classes), dtype=np.float32)
        for number, window in enumerate(self._windows):
            if window.bottom <= start:
                self._answers.pop(number, None)  # no later call asks above `start`
                continue
            if window.top >= stop:
                break
            low, high = max(start, window.top), min(stop, window.bottom)
            part = total[low - start : high - start, window.left : window.right]
            self._add(part, self._answer(number), low - window.top, high - window.top)
        count = self._down[start:stop, None] * self._across
        if count.max() > 1:
            total /= count[:, :, None].astype(np.float32)
        return total

    def _answer(self, number: int) -> Logits:
        while number not in self._answers:
            chunk = self._windows[self._next : self._next + self.batch]
            inputs = np.empty((len(chunk), self.image.shape[2], *self.crop), dtype=np.float32)
            for window, out in zip(chunk, inputs, strict=True):
                pixels = self.image[window.top : window.bottom, window.left : window.right]
                normalise(pixels, self.preprocessing, self.crop, out)
            for answer in self.run(inputs):
                self._answers[self._next] = answer.copy()  # not a view of the whole batch
                self._next += 1
        return self._answers[number]

    def _add(self, part: Logits, logits: Logits, start: int, stop: int) -> None:
        """Add rows ``start`` to ``stop`` of one window's logits, resized to the crop."""
        rows = bilinear(logits.shape[1], self.crop[0], align_corners=self.head.align_corners)
        columns = bilinear(logits.shape[2], self.crop[1], align_corners=self.head.align_corners)
        wanted = Taps(rows.index[start:stop], rows.weight[start:stop])
        kept = Taps(columns.index[: part.shape[1]], columns.weight[: part.shape[1]])
        for place, piece in View(ArrayRows(logits), wanted, kept).tiles():
            part[place] += piece

    def view(self, height: int, width: int, *, mirrored: bool = False) -> View:
        """The averaged logits, resized to an image's size; ``mirrored`` as `View` has it."""
        rows = bilinear(self.height, height, align_corners=self.head.align_corners)
        columns = bilinear(self.width, width, align_corners=self.head.align_corners)
        return View(self, rows, columns.mirrored(self.width) if mirrored else columns, mirrored)


def _cover(size: int, crop: int, stride: int) -> npt.NDArray[np.int64]:
    count = np.zeros(size, dtype=np.int64)
    for start in axis_starts(size, crop, stride):
        count[start : start + crop] += 1
    return count
