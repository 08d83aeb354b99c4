"""The answer to one image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import Preprocessing, SegmentorConfig
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.graph_runner import Runner
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.postprocessing import Labels, Logits, label_map
from fdconv_deploy.runtime.preprocessing import (
    FitDone,
    Placement,
    check_image,
    normalise,
    place,
    resize,
)
from fdconv_deploy.runtime.sliding_window import slide
from fdconv_deploy.runtime.visualization import RGB, class_areas, default_palette, mask_png, overlay


@dataclass(frozen=True)
class Segmentation:
    """Labels of an image, and how they came about.

    ``labels``: (H, W) at the image's own size, uint8, or uint16 above 256 classes; indices
    into ``classes`` and ``palette``. ``fit``: "resized" when the network saw the image in its
    own aspect ratio and nothing else, "stretched" or "letterboxed" when it had to be fitted, which
    changes the answer. ``timings``: seconds, by stage.
    """

    labels: Labels
    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    fit: FitDone
    mode: str
    timings: dict[str, float]

    def areas(self) -> npt.NDArray[np.int64]:
        """How many pixels each class has: (classes,) int64."""
        return class_areas(self.labels, len(self.classes))

    def mask_png(self) -> bytes:
        """An indexed PNG whose pixel values are the labels."""
        return mask_png(self.labels, self.palette)

    def overlay(self, image: npt.NDArray[Any], opacity: float = 0.5) -> npt.NDArray[np.uint8]:
        """The image with the classes' colours over it, (H, W, 3) uint8 RGB.

        Of an image that is not RGB, the first three bands or the first alone: see ``as_rgb``.
        """
        return overlay(image, self.labels, self.palette, opacity)


def class_names(architecture: SegmentorConfig) -> tuple[str, ...]:
    """The name of each label; numbers where the checkpoint gave none.

    Of a head with one output whose checkpoint names one class, that is label 1, and label 0 is
    called ``background``.
    """
    labels = architecture.decode_head.labels
    if not architecture.classes:
        return tuple(f"class {number}" for number in range(labels))
    return ("background",) * (labels - len(architecture.classes)) + architecture.classes


def class_palette(architecture: SegmentorConfig) -> tuple[RGB, ...]:
    """The colour of each label; generated where the checkpoint gave none.

    As for names, one colour for two labels is that of label 1, and label 0 is black.
    """
    labels = architecture.decode_head.labels
    if not architecture.palette:
        return default_palette(labels)
    return ((0, 0, 0),) * (labels - len(architecture.palette)) + architecture.palette


Mode = Literal["whole", "slide"]


@dataclass(frozen=True)
class Prepared:
    """An image ready for a ``whole`` run: see :meth:`Session.prepare`."""

    input: Logits
    placement: Placement
    image_size: tuple[int, int]
    seconds: float


class Segmenting(Runner):
    """What a session on a segmentor's bundle can do; on others it raises ``BundleError``."""

    @property
    def _architecture(self) -> SegmentorConfig:
        if self.bundle.manifest.architecture is None:
            raise self._is_not("segmentor")
        return self.bundle.manifest.architecture

    @property
    def _preprocessing(self) -> Preprocessing:
        return self._architecture.preprocessing

    @property
    def mode(self) -> Mode:
        """How the network was tested, and so how :meth:`segment` runs it by default."""
        return self._architecture.test.mode

    def segment(
        self,
        image: npt.NDArray[Any],
        *,
        fit: Fit | None = None,
        mode: Mode | None = None,
    ) -> Segmentation:
        """Label every pixel of an image.

        :param image: (H, W, 3) uint8 RGB, any size; of a network that loads otherwise,
            (H, W, C) of any real type with its bands (see ``Preprocessing.loading``).
        :param fit: how an image of other proportions is brought to the bundle's size in
            ``whole`` mode; the bundle's own choice when not given.
        :param mode: ``whole`` or ``slide``; the mode the network was tested in when not given.
        :raises ImageError: ``image`` is not such an array.
        :raises BundleError: the bundle is not a segmentor, or cannot slide.
        """
        mode = mode or self.mode
        if mode == "slide":
            arguments = self._architecture, self.input_size, self.run, self.batch_sizes[-1]
            labels, fitted, timings = slide(image, *arguments)
            return self._answer(labels, fitted, "slide", timings)
        if mode != "whole":
            raise ImageError(f"An image is segmented in mode 'whole' or 'slide', not {mode!r}.")
        prepared = self.prepare(image, fit=fit)
        start = time.perf_counter()
        logits = self.run(prepared.input[None])[0]
        return self.finish(prepared, logits, inference_seconds=time.perf_counter() - start)

    def prepare(self, image: npt.NDArray[Any], *, fit: Fit | None = None) -> Prepared:
        """The first third of a ``whole`` :meth:`segment`: resize and normalise.

        ``Prepared.input`` is (C, H, W) float32; those of several images may be stacked and
        run together, each answer being the one it would have alone.
        """
        start = time.perf_counter()
        image = check_image(image, self._preprocessing)
        size, network = (image.shape[0], image.shape[1]), self.input_size
        fit = fit or self.bundle.manifest.fit
        if fit not in ("stretch", "pad"):
            raise ImageError(f"An image is fitted by 'stretch' or 'pad', not {fit!r}.")
        placement = place(size, network, self._preprocessing, fit)
        resized = resize(image, placement.height, placement.width)
        tensor = normalise(resized, self._preprocessing, network)
        return Prepared(tensor, placement, size, time.perf_counter() - start)

    def finish(
        self, prepared: Prepared, logits: Logits, *, inference_seconds: float = 0.0
    ) -> Segmentation:
        """The last third of a ``whole`` :meth:`segment`: (classes, h, w) logits to labels."""
        start = time.perf_counter()
        head = self._architecture.decode_head
        labels = label_map(
            logits,
            self.input_size,
            (prepared.placement.height, prepared.placement.width),
            prepared.image_size,
            align_corners=head.align_corners,
            threshold=head.label_threshold,
        )
        timings = {
            "preprocess": prepared.seconds,
            "inference": inference_seconds,
            "postprocess": time.perf_counter() - start,
        }
        return self._answer(labels, prepared.placement.fit, "whole", timings)

    def _logits(self, batch: npt.NDArray[Any]) -> Logits:
        return self.run_batches({"images": self._as_input(batch)})["logits"]

    def _as_input(self, batch: npt.NDArray[Any]) -> Logits:
        (height, width), bands = self.input_size, self.channels
        shape: tuple[int, ...] = getattr(batch, "shape", ())
        kind = getattr(batch, "dtype", type(batch).__name__)
        if len(shape) == 4 and shape[0] > 0:
            if kind == np.float32 and shape[1:] == (bands, height, width):
                return batch
            if kind == np.uint8 and shape[1:] == (height, width, bands):
                out = np.empty((len(batch), bands, height, width), dtype=np.float32)
                for image, slot in zip(batch, out, strict=True):
                    normalise(image, self._preprocessing, out=slot)
                return out
        raise ImageError(
            f"This bundle runs batches (N, {height}, {width}, {bands}) uint8"
            f"{' RGB' * (bands == 3)} or (N, {bands}, {height}, {width}) float32 normalised, "
            f"N ≥ 1; found {shape} {kind}. segment() takes "
            "an image of any size."
        )

    def _answer(
        self, labels: Labels, fit: FitDone, mode: Mode, timings: dict[str, float]
    ) -> Segmentation:
        names, colours = class_names(self._architecture), class_palette(self._architecture)
        return Segmentation(labels, names, colours, fit, mode, timings)
