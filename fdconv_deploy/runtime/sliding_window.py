"""The published ``slide`` mode: a crop moved over the image, overlapping logits averaged.

As mmsegmentation's slide_inference: the grid has max(size − crop + stride − 1, 0) // stride
+ 1 windows along an axis, the last ones moved back inside the image; each window's logits
are resized to the crop; where windows overlap their logits are averaged. Only the windows
that the rows at hand need are kept, and at the head's resolution, so memory grows with the
image's width but not with its height.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import Preprocessing, SegmentorConfig, TestMode
from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime.postprocessing import (
    ArrayRows,
    Labels,
    Logits,
    Taps,
    bilinear,
    labels_of,
    resized_tiles,
)
from fdconv_deploy.runtime.preprocessing import (
    Pixels,
    check_image,
    normalise,
    published_size,
    resize,
)

Infer = Callable[[Logits], Logits]


@dataclass(frozen=True)
class Window:
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
    """The stride to slide a crop by.

    :raises BundleError: none was recorded, or it would leave pixels between windows.
    """
    if test.stride is None:
        tested = "in slide mode" if test.mode == "slide" else "on whole images"
        raise BundleError(
            f"The network was tested {tested}, and its bundle records no stride to slide by. Leave "
            "the mode out, or export it again with a config, or --set test.stride=[…], that gives "
            "one."
        )
    if any(s < 1 or s > c for s, c in zip(test.stride, crop, strict=True)):
        raise BundleError(
            f"The stride {test.stride} of the network's slide mode must be from 1 to the "
            f"bundle's input size {crop}, or pixels would lie between windows. Export it at "
            f"the network's crop size{f', {test.crop_size}' if test.crop_size else ''}."
        )
    return test.stride


class SlidingRows:
    """The averaged logits of a slid crop, row by row (a ``LogitRows``).

    :param image: (H, W, C), already resized as published.
    :param crop: (H, W) of the network's input. A smaller image is padded to it with the
        mean colour, at the bottom and right.
    :param infer: (n, C, *crop) float32 to (n, classes, h, w) float32, for n ≤ ``batch``.
    """

    def __init__(
        self,
        image: Pixels,
        preprocessing: Preprocessing,
        crop: tuple[int, int],
        stride: tuple[int, int],
        infer: Infer,
        *,
        classes: int,
        batch: int,
        align_corners: bool,
    ) -> None:
        self.height, self.width = image.shape[:2]
        self.classes = classes
        self._image, self._preprocessing = image, preprocessing
        self._crop, self._infer, self._batch = crop, infer, batch
        self._align = align_corners
        self._windows = windows_of((self.height, self.width), crop, stride)
        self._next = 0  # the first window not yet run
        self._answers: dict[int, Logits] = {}
        # How many windows cover a pixel: windows form a grid, so it is a product.
        self._cover = [
            _cover(size, crop[axis], stride[axis])
            for axis, size in enumerate((self.height, self.width))
        ]

    @property
    def padded(self) -> bool:
        """Whether the image is smaller than the crop, and so was padded."""
        return self.height < self._crop[0] or self.width < self._crop[1]

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
        count = self._cover[0][start:stop, None] * self._cover[1][None, :]
        if count.max() > 1:
            total /= count[:, :, None].astype(np.float32)
        return total

    def _answer(self, number: int) -> Logits:
        while number not in self._answers:
            chunk = self._windows[self._next : self._next + self._batch]
            inputs = np.empty((len(chunk), self._image.shape[2], *self._crop), dtype=np.float32)
            for window, out in zip(chunk, inputs, strict=True):
                pixels = self._image[window.top : window.bottom, window.left : window.right]
                normalise(pixels, self._preprocessing, self._crop, out)
            for answer in self._infer(inputs):
                self._answers[self._next] = answer.copy()  # not a view of the whole batch
                self._next += 1
        return self._answers[number]

    def _add(self, part: Logits, logits: Logits, start: int, stop: int) -> None:
        """Add rows ``start`` to ``stop`` of one window's logits, resized to the crop."""
        rows = bilinear(logits.shape[1], self._crop[0], align_corners=self._align)
        columns = bilinear(logits.shape[2], self._crop[1], align_corners=self._align)
        wanted = Taps(rows.index[start:stop], rows.weight[start:stop])
        kept = Taps(columns.index[: part.shape[1]], columns.weight[: part.shape[1]])
        for top, left, piece in resized_tiles(ArrayRows(logits), wanted, kept):
            height, width = piece.shape[:2]
            part[top : top + height, left : left + width] += piece


def slide_labels(
    source: SlidingRows,
    image: tuple[int, int],
    *,
    align_corners: bool,
    threshold: float | None = None,
) -> Labels:
    """Labels (H, W) at the size ``image``, from logits averaged at the resized size.

    ``threshold``: see :func:`labels_of`.
    """
    return labels_of(
        source,
        bilinear(source.height, image[0], align_corners=align_corners),
        bilinear(source.width, image[1], align_corners=align_corners),
        threshold=threshold,
    )


def _cover(size: int, crop: int, stride: int) -> npt.NDArray[np.int64]:
    count = np.zeros(size, dtype=np.int64)
    for start in axis_starts(size, crop, stride):
        count[start : start + crop] += 1
    return count


def slide(
    image: npt.NDArray[Any],
    architecture: SegmentorConfig,
    crop: tuple[int, int],
    run: Callable[[Logits], Logits],
    batch: int,
) -> tuple[Labels, Literal["letterboxed", "resized"], dict[str, float]]:
    """Label every pixel of an image, crop by crop.

    :param image: (H, W, C) as `check_image` takes it, any size.
    :param crop: height and width of the graphs' input.
    :param run: (N, C, *crop) float32 to logits, for any N.
    :param batch: how many crops to run together.
    :returns: the labels (H, W), whether the image had to be padded, and the seconds each stage
        took.
    :raises ImageError: ``image`` is not such an array.
    :raises BundleError: the network records no stride.
    """
    start, inside = time.perf_counter(), 0.0

    def timed(inputs: Logits) -> Logits:
        nonlocal inside
        began = time.perf_counter()
        try:
            return run(inputs)
        finally:
            inside += time.perf_counter() - began

    head = architecture.decode_head
    image = check_image(image, architecture.preprocessing)
    size = image.shape[0], image.shape[1]
    stride = slide_stride(architecture.test, crop)
    resized = resize(image, *published_size(*size, architecture.preprocessing))
    source = SlidingRows(
        resized,
        architecture.preprocessing,
        crop,
        stride,
        timed,
        classes=head.outputs,
        batch=batch,
        align_corners=head.align_corners,
    )
    before = time.perf_counter() - start
    labels = slide_labels(
        source, size, align_corners=head.align_corners, threshold=head.label_threshold
    )
    after = time.perf_counter() - start - before - inside
    timings = {"preprocess": before, "inference": inside, "postprocess": after}
    return labels, "letterboxed" if source.padded else "resized", timings
