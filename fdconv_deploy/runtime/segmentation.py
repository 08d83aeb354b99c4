"""The answer to one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import SegmentorConfig
from fdconv_deploy.runtime.preprocessing import FitDone
from fdconv_deploy.runtime.resize import Labels
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
