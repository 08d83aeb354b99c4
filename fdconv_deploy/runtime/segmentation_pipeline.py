"""A segmentor's way from an image to its labels."""

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
from fdconv_deploy.runtime.postprocessing import label_map
from fdconv_deploy.runtime.preprocessing import (
    FitDone,
    Placement,
    check_image,
    normalise,
    place,
    resize,
)
from fdconv_deploy.runtime.resize import Labels, Logits
from fdconv_deploy.runtime.segmentation import Segmentation, class_names, class_palette
from fdconv_deploy.runtime.sliding_inference import slide

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
