"""The answer to one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fdconv_deploy.architecture import Architecture

from .interpolation import Labels
from .preprocessing import FitDone
from .rendering import RGB, class_areas, default_palette, mask_png, overlay


@dataclass(frozen=True)
class Segmentation:
    """Labels of an image, and how they came about.

    ``labels``: (H, W) at the image's own size, uint8, or uint16 above 256 classes; indices
    into ``classes`` and ``palette``. ``fit``: "exact" when the network saw the image in its
    own proportions and nothing else, "stretch" or "pad" when it had to be fitted, which
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

    def overlay(self, image: npt.NDArray[np.uint8], opacity: float = 0.5) -> npt.NDArray[np.uint8]:
        """The image (H, W, 3) uint8 RGB with the classes' colours over it, as another such."""
        return overlay(image, self.labels, self.palette, opacity)


def class_names(architecture: Architecture) -> tuple[str, ...]:
    """The classes' names; numbers where the checkpoint gave none."""
    count = architecture.decode_head.num_classes
    return architecture.classes or tuple(f"class {number}" for number in range(count))


def class_palette(architecture: Architecture) -> tuple[RGB, ...]:
    """The classes' colours; generated where the checkpoint gave none."""
    return architecture.palette or default_palette(architecture.decode_head.num_classes)
