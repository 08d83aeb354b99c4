"""From a network's outputs to answers at the image's size: upsampling, choosing classes, masks.

As mmsegmentation does it: logits at the head's resolution are resized to the network's input, cut
to the part the image covers, resized to the image's own size, and the highest class wins; of a head
with one output, class 1 where its sigmoid is above the head's threshold. Both resizes are torch's
bilinear ``F.interpolate`` with the head's ``align_corners``.

Along one axis a resize is a small matrix with two entries per row (:class:`Taps`), so two resizes
in a row are one with four, and neither intermediate is ever made. :func:`labels_of` walks down the
result in blocks of rows: 150 classes on a 4K image are 5 GB of logits, of which some tens of
megabytes exist at a time. Own code, since ``cv2.resize`` (5.0) knows no ``align_corners``, takes
128 channels at most and, as ONNX Runtime's Resize does, makes all logits at once.

An instance's small mask is pasted as mmdetection pastes it when testing: the box is divided into
the mask's cells, whose values lie at their centres and are 0 outside; a pixel's value is
interpolated bilinearly at its own centre, and the pixel belongs to the instance from a threshold
on. (It is ``grid_sample`` without ``align_corners``, in float32.) On a GPU mmdetection samples the
whole image so, on a CPU the box and a pixel around it, which differs only for thresholds below 0.5;
this is the former. A box without area has an empty mask here; there, it paints stripes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fdconv_deploy.runtime.preprocessing import Prepared

Labels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Logits = npt.NDArray[np.float32]

_BLOCK_BYTES = 16 << 20  # of interpolated logits alive at once, per intermediate
_BLOCK_PIXELS = 1 << 20
_TILE = 48  # output rows or columns per matrix product: few enough that the band stays narrow
# Multiplications up to which OpenBLAS, numpy's own BLAS, stays on the calling thread. Its threads
# wait busily for each other: for products of this kind they burn a second core and save no time.
_ALONE = 1 << 18


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Parts of a picture (H, W, ...) from the top down, of about a million pixels each.

    What numpy makes on the way, such as an index of eight bytes for each pixel, is as small.
    """
    step = max(_BLOCK_PIXELS // max(shape[1], 1), 1)
    for top in range(0, shape[0], step):
        yield slice(top, top + step)


@dataclass(frozen=True)
class Taps:
    """A linear map along one axis: output i is Σ_t ``weight[i, t]`` · input[``index[i, t]``].

    ``index`` (n_out, t) int64, non-decreasing down each column; ``weight`` (n_out, t) float64.
    """

    index: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float64]

    @property
    def size(self) -> int:
        """The length of the output."""
        return len(self.index)

    @property
    def identity(self) -> bool:
        """Whether the output is the beginning of the input, unchanged."""
        return self.index.shape[1] == 1 and bool(
            np.array_equal(self.index[:, 0], np.arange(self.size))
        )

    def after(self, first: Taps) -> Taps:
        """This map applied to the output of ``first``, or to the beginning of it."""
        if self.identity:
            return Taps(first.index[: self.size], first.weight[: self.size])
        index = first.index[self.index].reshape(self.size, -1)
        weight = (self.weight[:, :, None] * first.weight[self.index]).reshape(self.size, -1)
        return Taps(index, weight)

    def mirrored(self, n_in: int) -> Taps:
        """This map of an input of length ``n_in`` reversed, its outputs in reverse order."""
        return Taps((n_in - 1 - self.index)[::-1], self.weight[::-1])

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The input range that outputs ``start`` to ``stop`` depend on."""
        part = self.index[start:stop]
        return int(part.min()), int(part.max()) + 1

    def matrix(self, start: int, stop: int) -> Logits:
        """Outputs ``start`` to ``stop`` as a dense matrix over their :meth:`span`."""
        low, high = self.span(start, stop)
        dense = np.zeros((stop - start, high - low))
        rows = np.arange(stop - start)[:, None]
        np.add.at(dense, (rows, self.index[start:stop] - low), self.weight[start:stop])
        return dense.astype(np.float32)


def bilinear(n_in: int, n_out: int, *, align_corners: bool) -> Taps:
    """The taps of ``F.interpolate(mode="bilinear")`` from ``n_in`` to ``n_out`` samples.

    The positions are those of torch's float32 arithmetic, fused multiply-add included:
    exact positions would move a logit by up to 1e-4 of its neighbours' difference.
    """
    if n_in == n_out:
        return Taps(np.arange(n_out)[:, None], np.ones((n_out, 1)))
    if align_corners:
        step = np.float32(n_in - 1) / np.float32(n_out - 1) if n_out > 1 else np.float32(0)
        position = step * np.arange(n_out, dtype=np.float32)
    else:
        step = np.float32(n_in) / np.float32(n_out)
        exact = np.float64(step) * (np.arange(n_out) + 0.5) - 0.5
        position = np.maximum(exact.astype(np.float32), np.float32(0))
    left = np.minimum(position.astype(np.int64), n_in - 1)
    right = np.minimum(left + 1, n_in - 1)
    share = (position - left.astype(np.float32)).astype(np.float64)
    return Taps(np.stack([left, right], axis=1), np.stack([1 - share, share], axis=1))


class LogitRows(Protocol):
    """Logits of ``classes`` and rows of ``width``, to be had some rows at a time, from the top."""

    classes: int
    width: int

    def rows(self, start: int, stop: int) -> Logits:
        """Rows ``start`` to ``stop``, as (rows, width, classes) float32.

        Successive calls never ask for rows above an earlier call's ``start``.
        """


class ArrayRows:
    """:class:`LogitRows` of a whole (classes, h, w) float32 array."""

    def __init__(self, logits: Logits) -> None:
        self._logits = logits
        self.classes, _, self.width = logits.shape

    def rows(self, start: int, stop: int) -> Logits:
        """Rows ``start`` to ``stop``, as (rows, width, classes) float32."""
        return np.ascontiguousarray(self._logits[:, start:stop].transpose(1, 2, 0))


class View(NamedTuple):
    """One answer to an image, and how it is resized to the image's size.

    ``mirrored``: the resized columns come in reverse order.
    """

    logits: LogitRows
    rows: Taps
    columns: Taps
    mirrored: bool = False

    def tiles(self, step: int | None = None) -> Iterator[tuple[tuple[slice, slice], Logits]]:
        """The resized logits piece by piece, ``step`` rows high: place, (h, w, classes) float32."""
        source, rows, columns, _ = self
        if not source.classes:  # as of an answer without objects
            return
        # Column tiles are the same in every block of rows, so their matrices are made once.
        shrinks = max(source.width / max(columns.size, 1), 1 / 8)
        tile = int(np.clip(math.sqrt(_ALONE / (source.classes * shrinks)) - 4, 4, _TILE))
        tiles = [(at, min(at + tile, columns.size)) for at in range(0, columns.size, tile)]
        matrices = [] if columns.identity else [columns.matrix(*tile) for tile in tiles]
        step = step or rows_at_a_time(source.width, source.classes)
        for top in range(0, rows.size, step):
            bottom = min(top + step, rows.size)
            first, last = rows.span(top, bottom)
            block = source.rows(first, last)
            if not rows.identity:
                flat = block.reshape(len(block), -1)
                resized = np.empty((bottom - top, flat.shape[1]), np.float32)
                for upper in range(top, bottom, _TILE):
                    lower = min(upper + _TILE, bottom)
                    low, high = rows.span(upper, lower)
                    _multiply(
                        rows.matrix(upper, lower),
                        flat[low - first : high - first],
                        resized[upper - top : lower - top],
                    )
                block = resized.reshape(bottom - top, *block.shape[1:])
            if columns.identity:
                yield (slice(top, bottom), slice(0, columns.size)), block[:, : columns.size]
                continue
            for (left, right), matrix in zip(tiles, matrices, strict=True):
                low, high = columns.span(left, right)
                yield (
                    (slice(top, bottom), slice(left, right)),
                    np.matmul(matrix, block[:, low:high]),
                )


def view_of(
    logits: Logits,
    prepared: Prepared,
    size: tuple[int, int] | None = None,
    *,
    align_corners: bool,
) -> View:
    """A prepared image's logits (classes, h, w) float32, as they are resized.

    They go from the head's resolution to the network's input, of which the part that the image
    covers goes to ``size`` (H, W), the image's own by default.
    """
    maps = []
    for axis, length in enumerate(size or prepared.image):
        first = bilinear(
            logits.shape[axis + 1], prepared.network[axis], align_corners=align_corners
        )
        second = bilinear(prepared.covered[axis], length, align_corners=align_corners)
        if axis == 1 and prepared.mirrored:
            second = second.mirrored(prepared.covered[1])
        maps.append(second.after(first))
    return View(ArrayRows(logits), maps[0], maps[1], prepared.mirrored)


def labels_of(*views: View, threshold: float | None = None, scores: bool = False) -> Labels:
    """The class of every pixel.

    Args:
        views: of one image. The class of several is told by the mean of their probabilities.
        threshold: `HeadConfig.label_threshold`: of a head with one output, the probability (0 to
            1) above which a pixel is of class 1, else of class 0; compared after resizing, as in
            mmsegmentation 1.2.2's ``BaseSegmentor.postprocess_result``.
        scores: several views give scores that are averaged as they are, not logits.

    Returns:
        (H, W) uint8, or uint16 above 256 classes; of equals, the lowest class.
    """
    source, rows, columns, _ = views[0]
    classes, height, width = source.classes, rows.size, columns.size
    if (classes == 1) != (threshold is not None):
        raise ValueError(f"{classes} logits a pixel do not go with threshold={threshold}.")
    labels = empty_labels((height, width), classes)
    if len(views) == 1:
        # A sigmoid is above the threshold where its logit is above the threshold's.
        cut = None if threshold is None else np.float32(logit_of(threshold))
        for place, logits in views[0].tiles():
            labels[place] = logits.argmax(axis=2) if cut is None else logits[:, :, 0] > cut
        return labels
    step = rows_at_a_time(width, classes)
    # Every view's pieces of the same rows, one after another.
    streams = [groupby(view.tiles(step), key=lambda piece: piece[0][0].start) for view in views]
    for pieces in zip(*streams, strict=True):
        top = pieces[0][0]
        total = np.zeros((min(step, height - top), width, classes), dtype=np.float32)
        for view, (_, tiles) in zip(views, pieces, strict=True):
            # Columns of a mirrored view come from the right.
            part = total[:, ::-1] if view.mirrored else total
            for (_, across), logits in tiles:
                found = logits if scores else (sigmoid if classes == 1 else softmax)(logits)
                part[:, across] += found
        if threshold is None:
            labels[top : top + len(total)] = total.argmax(axis=2)
        else:
            mean = total[:, :, 0] / np.float32(len(views))
            labels[top : top + len(total)] = mean > np.float32(threshold)
    return labels


def logits_of(view: View) -> Logits:
    """The resized logits, (classes, H, W) float32."""
    out = np.empty((view.logits.classes, view.rows.size, view.columns.size), dtype=np.float32)
    for (down, across), logits in view.tiles():
        out[:, down, across] = logits.transpose(2, 0, 1)
    return out


def empty_labels(shape: tuple[int, ...], classes: int) -> Labels:
    """An array for labels of so many classes: uint8, or uint16 above 256."""
    return np.empty(shape, np.uint8) if classes <= 256 else np.empty(shape, np.uint16)


def logit_of(probability: float) -> float:
    """The number whose sigmoid is ``probability``, 0 to 1."""
    if probability in (0, 1):
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability) - math.log1p(-probability)


def rows_at_a_time(width: int, classes: int) -> int:
    """How many rows of logits, (rows, width, classes), are in memory at a time."""
    return int(np.clip(_BLOCK_BYTES // (4 * classes * max(width, 1)), 8, 256))


def _multiply(left: Logits, right: Logits, out: Logits) -> None:
    """(m, k) times (k, n) into ``out`` (m, n), on the calling thread: see ``_ALONE``."""
    step = max(_ALONE // max(left.size, 1), 1)
    for at in range(0, right.shape[1], step):
        np.matmul(left, right[:, at : at + step], out=out[:, at : at + step])


def sigmoid(x: Logits) -> Logits:
    """Of each number, in float32."""
    with np.errstate(over="ignore"):  # to infinity, whose inverse is 0
        return np.float32(1) / (np.float32(1) + np.exp(-x))


def softmax(x: Logits) -> Logits:
    """Over the last axis, in float32."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


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
    """The pixels of one instance of an image of ``size`` (H, W).

    ``mask`` is (h, w) float32, 0 to 1; ``box`` (4,) float32 x1, y1, x2, y2 in pixels of the image;
    ``threshold`` mmdetection's ``mask_thr_binary``. At 0 or less, every pixel is the instance's.
    """
    if threshold <= 0:
        return Pasted(0, 0, np.ones(size, np.bool_))
    top, rows = _along(box[1], box[3], mask.shape[0], size[0])
    left, columns = _along(box[0], box[2], mask.shape[1], size[1])
    across = np.empty((mask.shape[0], len(columns)), np.float32)
    _multiply(mask.astype(np.float32, copy=False), columns.T, across)
    values = np.empty((len(rows), len(columns)), np.float32)
    for at in range(0, len(rows), _TILE):
        _multiply(rows[at : at + _TILE], across, values[at : at + _TILE])
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
