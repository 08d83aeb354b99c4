"""Semantic segmentation: what is done with an image before and after a run, and the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import SegmentorConfig
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.postprocessing import Labels, Logits, label_map, row_blocks
from fdconv_deploy.runtime.preprocessing import (
    FitDone,
    Prepared,
    best_size,
    check_image,
    normalise,
    place,
    published_size,
    resize,
)
from fdconv_deploy.runtime.sliding_window import SlidingRows, crop_within, slide_stride
from fdconv_deploy.runtime.visualization import RGB, default_palette, mask_png, overlay

Mode = Literal["whole", "slide"]
# The class of pixels that are in no segment of a panoptic answer.
VOID = "void"


@dataclass(frozen=True)
class Segmentation:
    """Labels of an image, and how they were computed.

    Attributes:
        labels: (H, W) at the image's own size, uint8, or uint16 above 256 classes; indices into
            ``classes`` and ``palette``.
        classes: the names of the classes.
        palette: an RGB colour for each class.
        fit: "resized" when the network saw the image in its own aspect ratio and nothing else,
            "stretched" or "letterboxed" when it had to be fitted, which changes the answer.
        mode: "whole" or "slide".
        timings: seconds, by stage.
    """

    labels: Labels
    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    fit: FitDone
    mode: str
    timings: dict[str, float]

    def areas(self) -> npt.NDArray[np.int64]:
        """How many pixels each class has: (classes,) int64."""
        counts = np.zeros(len(self.classes), np.int64)
        for rows in row_blocks(self.labels.shape):
            counts += np.bincount(self.labels[rows].reshape(-1), minlength=len(counts))
        return counts

    def shares(self) -> dict[str, float]:
        """The share of the image's pixels, 0 to 1, of each class that is in it."""
        shares = self.areas() / self.labels.size
        return {n: float(s) for n, s in zip(self.classes, shares, strict=True) if s}

    def mask_png(self) -> bytes:
        """An indexed PNG whose pixel values are the labels."""
        return mask_png(self.labels, self.palette)

    def overlay(self, image: npt.NDArray[Any], opacity: float = 0.5) -> npt.NDArray[np.uint8]:
        """The image with the classes' colours over it, (H, W, 3) uint8 RGB.

        Of an image that is not RGB, the first three bands or the first alone: see ``as_rgb``.
        """
        return overlay(image, self.labels, self.palette, opacity)


class SegmentationPipeline:
    """A segmentor's steps before and after a run of its network.

    Args:
        segmentor: what the network is made of.
        size: (height, width) of its input, and of a sliding crop.
        fit: how images of another aspect ratio are brought to an input by default.
        other_sizes: further input sizes; an image takes that nearest to its proportions, see
            ``best_size``.
    """

    def __init__(
        self,
        segmentor: SegmentorConfig,
        size: tuple[int, int],
        fit: Fit,
        other_sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.preprocessing = segmentor.preprocessing
        self.size, self.sizes = size, (size, *other_sizes)
        self.fit = fit
        self.mode: Mode = segmentor.test.mode
        self.classes = class_names(segmentor)
        self.palette = class_palette(segmentor)
        self._head, self._test = segmentor.decode_head, segmentor.test

    def prepare(
        self, image: npt.NDArray[Any], *, fit: Fit | None = None, mirrored: bool = False
    ) -> Prepared:
        """Resize and normalise an image for a ``whole`` run.

        Args:
            image: as ``Session.segment`` takes it.
            fit: how an image of another aspect ratio is brought to the input's size.
            mirrored: left for right, once it is resized.

        Returns:
            The input ``images`` (C, H, W) float32.

        Raises:
            ImageError: ``image`` is not such an array.
        """
        start = time.perf_counter()
        image = check_image(image, self.preprocessing)
        fit = fit or self.fit
        if fit not in ("stretch", "pad"):
            raise ImageError(f"An image is fitted by 'stretch' or 'pad', not {fit!r}.")
        network = best_size((image.shape[0], image.shape[1]), self.sizes)
        placement = place((image.shape[0], image.shape[1]), network, self.preprocessing, fit)
        resized = resize(image, placement.height, placement.width, self.preprocessing.resample)
        resized = resized[:, ::-1] if mirrored else resized
        tensor = normalise(resized, self.preprocessing, network)
        return Prepared({"images": tensor}, placement, time.perf_counter() - start, network)

    def finish(
        self,
        prepared: Prepared,
        outputs: Mapping[str, npt.NDArray[Any]],
        inference_seconds: float = 0.0,
        *,
        size: tuple[int, int] | None = None,
    ) -> Segmentation:
        """Choose the class of each pixel.

        Args:
            prepared: the image, as :meth:`prepare` gave it.
            outputs: the network's output for it: ``logits`` (classes, h, w) float32.
            inference_seconds: what the run took, for ``Segmentation.timings``.
            size: (H, W) of the answer; the image's by default.
        """
        start = time.perf_counter()
        placement = prepared.placement
        labels = label_map(
            outputs["logits"],
            prepared.network,
            (placement.height, placement.width),
            size or placement.image,
            align_corners=self._head.align_corners,
            threshold=self._head.label_threshold,
        )
        timings = prepared.timings(inference_seconds, start)
        return Segmentation(labels, self.classes, self.palette, placement.fit, "whole", timings)

    def slide(
        self,
        image: npt.NDArray[Any],
        run: Callable[[Logits], Logits],
        batch: int,
        *,
        any_size: bool = False,
    ) -> Segmentation:
        """Label an image by sliding a crop of the input's size over it.

        Args:
            image: as ``Session.segment`` takes it.
            run: (N, C, *size) float32 to logits, for any N.
            batch: how many crops to run together.
            any_size: ``run`` takes inputs of any size, and an image that is smaller than the crop
                is one, as published; otherwise it is padded to the crop.

        Raises:
            ImageError: ``image`` is not such an array.
            BundleError: the network records no stride.
        """
        start, inside = time.perf_counter(), 0.0

        def timed(inputs: Logits) -> Logits:
            nonlocal inside
            began = time.perf_counter()
            logits = run(inputs)
            inside += time.perf_counter() - began
            return logits

        image = check_image(image, self.preprocessing)
        stride = slide_stride(self._test, self.size)
        published = published_size(image.shape[0], image.shape[1], self.preprocessing)
        resized = resize(image, *published, self.preprocessing.resample)
        crop = crop_within(self.size, resized) if any_size else self.size
        source = SlidingRows(resized, self.preprocessing, crop, stride, timed, self._head, batch)
        before = time.perf_counter() - start
        labels = source.labels(image.shape[0], image.shape[1])
        timings = {
            "preprocess": before,
            "inference": inside,
            "postprocess": time.perf_counter() - start - before - inside,
        }
        fit: FitDone = "letterboxed" if source.padded else "resized"
        return Segmentation(labels, self.classes, self.palette, fit, "slide", timings)

    def normalise_batch(self, batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Images of exactly an input's size as the network takes them.

        Args:
            batch: (N, H, W, C) uint8, RGB where C is 3; or (N, C, H, W) float32, normalised.

        Returns:
            (N, C, H, W) float32.

        Raises:
            ImageError: another shape or type.
        """
        bands, (height, width) = self.preprocessing.channels, self.size
        shape: tuple[int, ...] = getattr(batch, "shape", ())
        kind = getattr(batch, "dtype", type(batch).__name__)
        if len(shape) == 4 and shape[0] > 0:
            if kind == np.float32 and shape[1] == bands and shape[2:] in self.sizes:
                return batch
            if kind == np.uint8 and shape[3] == bands and shape[1:3] in self.sizes:
                out = np.empty((len(batch), bands, *shape[1:3]), np.float32)
                for image, slot in zip(batch, out, strict=True):
                    normalise(image, self.preprocessing, out=slot)
                return out
        raise ImageError(
            f"This bundle runs batches (N, {height}, {width}, {bands}) uint8"
            f"{' RGB' * (bands == 3)} or (N, {bands}, {height}, {width}) float32 normalised, "
            f"N ≥ 1{also(self.sizes)}; found {shape} {kind}. segment() takes an image of any size."
        )


def also(sizes: Sequence[tuple[int, int]]) -> str:
    """The input sizes after the first, as the end of a clause; empty where there are none."""
    more = " or ".join(f"{height}x{width}" for height, width in sizes[1:])
    return more and f", or of {more} pixels"


def class_names(architecture: SegmentorConfig) -> tuple[str, ...]:
    """The name of each label; numbers where the checkpoint gave none.

    Of a head with one output whose checkpoint names one class, that is label 1, and label 0 is
    called ``background``. Panoptic answers have one label more, of what is in no segment.
    """
    labels = architecture.decode_head.labels
    void = (VOID,) * (architecture.panoptic is not None)
    if not architecture.classes:
        return (*(f"class {number}" for number in range(labels)), *void)
    return ("background",) * (labels - len(architecture.classes)) + architecture.classes + void


def class_palette(architecture: SegmentorConfig) -> tuple[RGB, ...]:
    """The colour of each label; generated where the checkpoint gave none.

    As for names, one colour for two labels is that of label 1, and label 0 is black.
    """
    labels = architecture.decode_head.labels
    void = ((0, 0, 0),) * (architecture.panoptic is not None)
    if not architecture.palette:
        return default_palette(labels) + void
    return ((0, 0, 0),) * (labels - len(architecture.palette)) + architecture.palette + void
