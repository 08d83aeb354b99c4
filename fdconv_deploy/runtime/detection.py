"""The answer to one image: its objects."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fdconv_deploy.coco_rle import Rle, encode_part
from fdconv_deploy.config import SIZE_DIVISOR, DetectorConfig, Preprocessing
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.graph_runner import Runner, Tensors
from fdconv_deploy.runtime.instance_masks import Pasted, Probabilities, paste
from fdconv_deploy.runtime.preprocessing import (
    FitDone,
    check_image,
    fitting_size,
    normalise,
    published_size,
    resize,
)
from fdconv_deploy.runtime.visualization import (
    RGB,
    default_palette,
    draw_instances,
    encode,
    instance_colours,
    mask_png,
)

# mmdetection draws objects from this score on; its answers hold those far below, too.
SHOWN_SCORE = 0.3


@dataclass(frozen=True)
class Detection:
    """Objects found in an image, the best score first, and how they came about.

    ``boxes``: (N, 4) float32 x1, y1, x2, y2 in pixels of the image, whose top left corner is
    (0, 0). ``scores``: (N,) float32, 0 to 1. ``labels``: (N,) int64, indices into ``classes``
    and ``palette``. ``mask_probabilities``: (N, h, w) float32 over each box; None when the
    network gives no masks. ``image_size``, ``resized_to``: (H, W) of the image, and of the
    part of the network's input it covered. ``fit``: "resized" when the network saw the image with
    no more padding than published, "letterboxed" when with more, which changes the answer somewhat.
    ``timings``: seconds, by stage.
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

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def has_masks(self) -> bool:
        """Whether the network gives masks."""
        return self.mask_probabilities is not None

    @cached_property
    def pasted(self) -> tuple[Pasted, ...]:
        """Each object's mask about its box: made when first asked for.

        :raises ImageError: the network gives none.
        """
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
            part.into(canvas)
        return found

    def rle(self) -> list[Rle]:
        """Every object's pixels as COCO's compressed run lengths.

        :raises ImageError: the network gives no masks.
        """
        return [encode_part(p.pixels, p.top, p.left, self.image_size) for p in self.pasted]

    def areas(self) -> npt.NDArray[np.int64]:
        """How many pixels each object has: (N,) int64.

        :raises ImageError: the network gives no masks.
        """
        return np.array([part.pixels.sum() for part in self.pasted], np.int64)

    def kept(
        self, min_score: float = 0.0, labels: tuple[int, ...] | None = None, most: int | None = None
    ) -> Detection:
        """Only objects that score ``min_score`` or more, of some classes, the best ``most``."""
        chosen = self.scores >= min_score
        if labels is not None:
            chosen &= np.isin(self.labels, labels)
        at = np.flatnonzero(chosen)[:most]
        masks = self.mask_probabilities
        return replace(
            self,
            boxes=self.boxes[at],
            scores=self.scores[at],
            labels=self.labels[at],
            mask_probabilities=None if masks is None else masks[at],
        )

    def instance_map(self) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
        """(H, W): 0 where there is nothing, else the object's place in the answer, plus 1.

        uint8, or uint16 above 255 objects. Where objects overlap, the better score is on top.

        :raises ImageError: the network gives no masks.
        """
        canvas = np.zeros(self.image_size, np.uint8 if len(self) < 256 else np.uint16)
        for number, part in reversed(list(enumerate(self.pasted, 1))):
            height, width = part.pixels.shape
            region = canvas[part.top : part.top + height, part.left : part.left + width]
            region[part.pixels] = number
        return canvas

    def mask_png(self) -> bytes:
        """:meth:`instance_map` as an indexed PNG, each object in a colour of its own.

        Above 255 objects, as a gray one of 16 bits.
        """
        numbers = self.instance_map()
        if numbers.dtype == np.uint16:
            return encode(Image.fromarray(numbers), "PNG")
        return mask_png(numbers, instance_colours(len(self)))

    def overlay(self, image: npt.NDArray[np.uint8], opacity: float = 0.5) -> npt.NDArray[np.uint8]:
        """The image (H, W, 3) uint8 RGB with masks, boxes, names and scores, as another such."""
        if image.shape[:2] != self.image_size:
            raise ImageError(
                f"The image {image.shape[:2]} and the one the objects were found in "
                f"{self.image_size} differ in size."
            )
        return draw_instances(image, self, opacity)

    def as_dicts(self, *, masks: bool = True) -> list[dict[str, Any]]:
        """For JSON, an object each: class, score, box, and its mask's run lengths and area.

        :param masks: False leaves out run lengths and areas, as do networks without masks.
        """
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


@dataclass(frozen=True)
class DetectorPlacement:
    """Where an image of ``image`` (H, W) lies in a detector's input: the top left.

    ``height``, ``width``: the pixels of the input that it covers. ``fit``: "resized", with no
    more padding than published; "letterboxed", padded further.
    """

    fit: FitDone
    height: int
    width: int
    image: tuple[int, int]

    @property
    def scale_factor(self) -> npt.NDArray[np.float32]:
        """(4,) float32: what x1, y1, x2, y2 of the image are multiplied with."""
        across, down = self.width / self.image[1], self.height / self.image[0]
        return np.array([across, down, across, down], np.float32)

    def to_image(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Boxes (N, 4) in pixels of the input to pixels of the image, and within it."""
        height, width = self.image
        bounds = np.array([width, height, width, height], np.float32)
        # They were clipped in the network; dividing may round them out again.
        return np.clip(boxes / self.scale_factor, 0, bounds)


def published_input(image: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """The (H, W) of the input that the published pipeline makes of an image (H, W)."""
    return _padded(published_size(*image, preprocessing))


def place_whole(
    image: tuple[int, int], network: tuple[int, int], preprocessing: Preprocessing
) -> DetectorPlacement:
    """Decide how an image (H, W) goes into an input (H, W).

    At the published size where that fits, else as large as fits; so too where the checkpoint
    told no size.
    """
    size = published_size(*image, preprocessing)
    if preprocessing.scale is None or size[0] > network[0] or size[1] > network[1]:
        size = fitting_size(image, network)
    exact = network in (size, _padded(size))
    return DetectorPlacement("resized" if exact else "letterboxed", *size, image)


def _padded(size: tuple[int, int]) -> tuple[int, int]:
    height, width = (-(-length // SIZE_DIVISOR) * SIZE_DIVISOR for length in size)
    return height, width


def prepare(
    image: npt.NDArray[np.uint8],
    network: tuple[int, int],
    preprocessing: Preprocessing,
    out: npt.NDArray[np.float32],
) -> DetectorPlacement:
    """Resize an image, normalise it, and pad it with zeros.

    :param image: (h, w, 3) uint8 RGB.
    :param network: (H, W) of the input.
    :param out: (3, H, W) float32, written into.
    :raises ImageError: ``image`` is not such an array.
    """
    image = check_image(image, preprocessing)
    placement = place_whole((image.shape[0], image.shape[1]), network, preprocessing)
    normalise(resize(image, placement.height, placement.width), preprocessing, network, out=out)
    return placement


def finish(
    outputs: Mapping[str, npt.NDArray[Any]],
    placement: DetectorPlacement,
    detector: DetectorConfig,
    seconds: dict[str, float],
) -> Detection:
    """One image's outputs, as ``Manifest`` says them without the batch, as its objects.

    :param seconds: of the stages before this one.
    """
    start = time.perf_counter()
    count = int(outputs["count"])
    masks = outputs.get("masks")
    boxes = placement.to_image(outputs["boxes"][:count])
    timings = {**seconds, "postprocess": time.perf_counter() - start}
    return Detection(
        boxes,
        # Copies, since these are parts of a whole batch's.
        outputs["scores"][:count].copy(),
        outputs["labels"][:count].copy(),
        None if masks is None else masks[:count].copy(),
        detector.test.rcnn.mask_thr_binary,
        placement.image,
        (placement.height, placement.width),
        detector_classes(detector),
        detector_palette(detector),
        placement.fit,
        timings,
    )


def detector_classes(detector: DetectorConfig) -> tuple[str, ...]:
    """The classes' names; numbers where the checkpoint gave none."""
    count = detector.bbox_head.num_classes
    return detector.classes or tuple(f"class {number}" for number in range(count))


def detector_palette(detector: DetectorConfig) -> tuple[RGB, ...]:
    """The classes' colours; generated where the checkpoint gave none, black not among them."""
    return detector.palette or default_palette(detector.bbox_head.num_classes + 1)[1:]


Rows = npt.NDArray[Any]  # of a structured type: a field for each tensor, a row for each image


@dataclass(frozen=True)
class PreparedDetection:
    """An image ready for a run: see :meth:`Detecting.prepare_detection`.

    ``input``: one row, () of :meth:`Detecting.row_type`.
    """

    input: Rows
    placement: DetectorPlacement
    seconds: float


class Detecting(Runner):
    """What a session on a detector's bundle can do; on others it raises ``BundleError``."""

    @property
    def _detector(self) -> DetectorConfig:
        if self.bundle.manifest.detector is None:
            raise self._is_not("detector")
        return self.bundle.manifest.detector

    @property
    def row_type(self) -> np.dtype[Any]:
        """An image as :meth:`run_rows` takes it, both of a detector's inputs in one array.

        Fields ``images`` (3, H, W) and ``sizes`` (2,), float32, as the graph has them.
        """
        height, width = self.input_size
        return np.dtype([("images", np.float32, (3, height, width)), ("sizes", np.float32, 2)])

    @property
    def finds_masks(self) -> bool:
        """Whether the detector gives a mask for each object."""
        return self._detector.mask_head is not None

    def detect(self, image: npt.NDArray[np.uint8]) -> Detection:
        """Find the objects in an image.

        :param image: (H, W, 3) uint8 RGB, any size. It is resized in its own proportions, as
            published, or smaller where it would not fit the bundle's size.
        :raises ImageError: ``image`` is not such an array.
        :raises BundleError: the bundle is not of a detector.
        """
        prepared = self.prepare_detection(image)
        start = time.perf_counter()
        row = self.run(prepared.input[None])[0]
        seconds = time.perf_counter() - start
        return self.finish_detection(prepared, row, inference_seconds=seconds)

    def prepare_detection(self, image: npt.NDArray[np.uint8]) -> PreparedDetection:
        """The first third of :meth:`detect`: resize, normalise and pad.

        The ``input`` of several images may be stacked and run together.
        """
        start = time.perf_counter()
        row = np.empty((), self.row_type)
        preprocessing = self._detector.preprocessing
        placement = prepare(image, self.input_size, preprocessing, out=row["images"])
        row["sizes"] = placement.height, placement.width
        return PreparedDetection(row, placement, time.perf_counter() - start)

    def finish_detection(
        self, prepared: PreparedDetection, row: Rows, *, inference_seconds: float = 0.0
    ) -> Detection:
        """The last third of :meth:`detect`: boxes back to the image's pixels.

        :param row: of what :meth:`run_rows` gives.
        """
        names = row.dtype.names or ()
        outputs = {name: row[name] for name in names}
        seconds = {"preprocess": prepared.seconds, "inference": inference_seconds}
        return finish(outputs, prepared.placement, self._detector, seconds)

    def run_detector(
        self, images: npt.NDArray[np.float32], sizes: npt.NDArray[np.float32]
    ) -> Tensors:
        """A detector's outputs by name, as its graph gives them; see ``Manifest``.

        :param images: (N, 3, H, W) float32, normalised, zero past each image's size; any N.
        :param sizes: (N, 2) float32, height and width of each image within its input.
        :raises ImageError: another shape or type.
        """
        expected = self.row_type
        for name, given in (("images", images), ("sizes", sizes)):
            shape = expected[name].shape
            if given.dtype != np.float32 or given.shape[1:] != shape or not len(given):
                raise ImageError(
                    f"This bundle runs {name} (N, {', '.join(map(str, shape))}) float32, N ≥ 1; "
                    f"found {given.shape} {given.dtype}. detect() takes an image of any size."
                )
        if len(images) != len(sizes):
            raise ImageError(
                f"Every image has a size: found {len(images)} images and {len(sizes)} sizes."
            )
        return self.run_batches({"images": images, "sizes": sizes})

    def run_rows(self, batch: Rows) -> Rows:
        """As :meth:`run_detector`, an image and an answer a row.

        One array in and one out is what queues and worker processes carry.

        :param batch: (N,) of :meth:`row_type`.
        :returns: (N,) with a field for each output.
        """
        if batch.dtype != self.row_type or batch.ndim != 1:
            raise ImageError(
                f"This bundle runs rows (N,) {self.row_type}; found {batch.shape} {batch.dtype}. "
                "detect() takes an image of any size."
            )
        return as_rows(self.run_detector(batch["images"], batch["sizes"]))


def as_rows(tensors: Tensors) -> Rows:
    """Tensors of N images, one field each: (N,)."""
    fields = [(name, found.dtype, found.shape[1:]) for name, found in tensors.items()]
    rows = np.empty(len(next(iter(tensors.values()))), np.dtype(fields, align=True))
    for name, found in tensors.items():
        rows[name] = found
    return rows
