"""Detection of objects: what is done with an image before and after a run, and the answer.

As mmdetection does it. An image is resized in its own aspect ratio to a budget of pixels
(``mmcv.imrescale``), with one scale factor for each direction, since rounding parts them;
normalised; then padded with zeros at the right and the bottom to multiples of 32. A bundle's
input has one size, so an image may be padded further here, or made smaller to fit at all. FDConv
layers average over the padding too, so both change the answer somewhat, and it says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fdconv_deploy.coco_rle import Rle
from fdconv_deploy.coco_rle import encode as encode_mask
from fdconv_deploy.config import DetectorConfig
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.postprocessing import Pasted, Probabilities, paste
from fdconv_deploy.runtime.preprocessing import FitDone, Prepared, prepare_image
from fdconv_deploy.runtime.segmentation import Mode, classes_of
from fdconv_deploy.runtime.visualization import (
    RGB,
    check_drawing,
    default_palette,
    draw_instances,
    encode,
    mask_png,
)

# mmdetection draws objects from this score on; its answers hold those far below, too.
SHOWN_SCORE = 0.3


@dataclass(frozen=True)
class Detection:
    """Objects found in an image, the best score first, and how they were computed.

    Attributes:
        boxes: (N, 4) float32 x1, y1, x2, y2 in pixels of the image, whose top left corner is
            (0, 0).
        scores: (N,) float32, 0 to 1.
        labels: (N,) int64, indices into ``classes`` and ``palette``.
        mask_probabilities: (N, h, w) float32 over each box; None when the network gives no masks.
        mask_threshold: the probability from which a pixel belongs to an object.
        image_size: (H, W) of the image.
        resized_to: (H, W) of the part of the network's input that it covered.
        classes: the names of the classes.
        palette: an RGB colour for each class.
        fit: "resized" when the network saw the image with no more padding than published,
            "letterboxed" when with more, which changes the answer somewhat.
        timings: seconds, by stage.
        parts: of a panoptic network, each object's own pixels within the box about them, in place
            of masks over boxes.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    mask_probabilities: Probabilities | None
    mask_threshold: float
    image_size: tuple[int, int]
    resized_to: tuple[int, int]
    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    fit: FitDone
    timings: dict[str, float]
    parts: tuple[Pasted, ...] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def has_masks(self) -> bool:
        """Whether the network gives masks."""
        return self.parts is not None or self.mask_probabilities is not None

    @cached_property
    def pasted(self) -> tuple[Pasted, ...]:
        """Each object's mask about its box, made when asked for; ``ImageError`` without masks."""
        if self.parts is not None:
            return self.parts
        if self.mask_probabilities is None:
            raise ImageError(
                "This network finds boxes and no masks (it has no mask head). Ask for its boxes."
            )
        return tuple(
            paste(mask, box, self.image_size, self.mask_threshold)
            for mask, box in zip(self.mask_probabilities, self.boxes, strict=True)
        )

    @property
    def masks(self) -> npt.NDArray[np.bool_] | None:
        """Every object's pixels, (N, H, W) bool, made anew each time; None without masks."""
        if not self.has_masks:
            return None
        found = np.zeros((len(self), *self.image_size), np.bool_)
        for canvas, part in zip(found, self.pasted, strict=True):
            part.of(canvas)[:] = part.pixels
        return found

    def rle(self) -> list[Rle]:
        """Every object's pixels as COCO's compressed run lengths; ``ImageError`` without masks."""
        return [encode_mask(p.pixels, p.top, p.left, self.image_size) for p in self.pasted]

    def areas(self) -> npt.NDArray[np.int64]:
        """How many pixels each object has: (N,) int64; ``ImageError`` without masks."""
        return np.array([part.pixels.sum() for part in self.pasted], np.int64)

    def kept(
        self, min_score: float = 0.0, labels: tuple[int, ...] | None = None, most: int | None = None
    ) -> Detection:
        """Only objects that score ``min_score`` or more, of some classes, the best ``most``."""
        chosen = self.scores >= min_score
        if labels is not None:
            chosen &= np.isin(self.labels, labels)
        at = np.flatnonzero(chosen)[:most]
        masks, parts = self.mask_probabilities, self.parts
        return replace(
            self,
            boxes=self.boxes[at],
            scores=self.scores[at],
            labels=self.labels[at],
            mask_probabilities=None if masks is None else masks[at],
            parts=None if parts is None else tuple(parts[number] for number in at),
        )

    def instance_map(self) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
        """(H, W): 0 where there is nothing, else the object's place in the answer, plus 1.

        uint8, or uint16 above 255 objects. Where objects overlap, the better score is on top.
        ``ImageError`` without masks.
        """
        canvas = np.zeros(self.image_size, np.uint8 if len(self) < 256 else np.uint16)
        for number, part in reversed(list(enumerate(self.pasted, 1))):
            part.of(canvas)[part.pixels] = number
        return canvas

    def mask_png(self) -> bytes:
        """:meth:`instance_map` as an indexed PNG, each object in a colour of its own.

        Above 255 objects, as a gray one of 16 bits.
        """
        numbers = self.instance_map()
        if numbers.dtype == np.uint16:
            return encode(Image.fromarray(numbers), "PNG")
        return mask_png(numbers, default_palette(len(self) + 1))

    def overlay(self, image: npt.NDArray[np.uint8], opacity: float = 0.5) -> npt.NDArray[np.uint8]:
        """The image (H, W, 3) uint8 RGB with masks, boxes, names and scores, as another such."""
        check_drawing(image, self.image_size, opacity)
        labels = self.labels.tolist()
        captions = [
            f"{self.classes[label]} {score:.2f}"
            for label, score in zip(labels, self.scores, strict=True)
        ]
        colours = [self.palette[label] for label in labels]
        masks = self.pasted if self.has_masks else ()
        return draw_instances(image, self.boxes, captions, colours, masks, opacity)

    def as_dicts(self, *, masks: bool = True) -> list[dict[str, Any]]:
        """For JSON, an object each: class, score, box, and if ``masks`` run lengths and area."""
        found: list[dict[str, Any]] = [
            {
                "label": label,
                "class": self.classes[label],
                "score": round(score, 6),
                "box": [round(edge, 3) for edge in box],
            }
            for label, score, box in zip(
                self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True
            )
        ]
        if masks and self.has_masks:
            for entry, rle, area in zip(found, self.rle(), self.areas().tolist(), strict=True):
                entry |= {"area": area, "mask": rle}
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: size, and the objects."""
        height, width = self.image_size
        own = {"height": height, "width": width, "resized_to": list(self.resized_to)}
        return {**own, "instances": self.as_dicts()}


class DetectionPipeline:
    """A detector's steps before and after a run; ``sizes`` are (H, W) of its network's inputs."""

    mode: Mode = "whole"

    def __init__(self, detector: DetectorConfig, sizes: Sequence[tuple[int, int]]) -> None:
        self.preprocessing, self.sizes = detector.preprocessing, tuple(sizes)
        self.classes, self.palette = classes_of(detector)
        self.finds_masks = detector.mask_head is not None
        self._mask_threshold = detector.test.rcnn.mask_thr_binary

    def prepare(self, image: npt.NDArray[np.uint8], *, fit: Fit | None = None) -> Prepared:
        """Its inputs ``images`` (3, H, W) and ``sizes`` (2,) float32; see `prepare_image`."""
        if fit == "stretch":
            raise ImageError("A detector's images are padded, as published. Leave the fit out.")
        prepared = prepare_image(image, self.preprocessing, self.sizes, None)
        prepared.inputs["sizes"] = np.array(prepared.covered, np.float32)
        return prepared

    def finish(
        self,
        prepared: Prepared,
        outputs: Mapping[str, npt.NDArray[Any]],
        inference_seconds: float = 0.0,
    ) -> Detection:
        """Bring boxes back to the image's pixels; ``outputs`` are `Manifest`'s for one image."""
        start = time.perf_counter()
        count, (height, width) = int(outputs["count"]), prepared.image
        across, down = prepared.covered[1] / width, prepared.covered[0] / height
        scale = np.array([across, down] * 2, np.float32)
        edges = np.array([width, height] * 2, np.float32)
        # They were clipped in the network; dividing may round them out again.
        boxes = np.clip(outputs["boxes"][:count] / scale, 0, edges).astype(np.float32, copy=False)
        masks = outputs.get("masks")
        return Detection(
            boxes,
            # Copies, since these are parts of a whole batch's.
            outputs["scores"][:count].copy(),
            outputs["labels"][:count].copy(),
            None if masks is None else masks[:count].copy(),
            self._mask_threshold,
            prepared.image,
            prepared.covered,
            self.classes,
            self.palette,
            prepared.fit,
            prepared.timings(inference_seconds, start),
        )
