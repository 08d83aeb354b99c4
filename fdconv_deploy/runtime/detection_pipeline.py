"""A detector's way from an image to its objects."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import DetectorConfig
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.detection import Detection
from fdconv_deploy.runtime.detection_letterbox import DetectorPlacement
from fdconv_deploy.runtime.detection_preprocessing import finish, prepare
from fdconv_deploy.runtime.graph_runner import Runner, Tensors

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
