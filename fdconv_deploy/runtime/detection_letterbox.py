"""How an image goes into a detector's input, and its boxes come back, as in mmdetection.

Published: resized in its own proportions to a budget of pixels (``mmcv.imrescale``), with one
scale factor for each direction, since rounding parts them; normalised; then padded with
zeros at the right and the bottom to multiples of 32. A bundle's input has one size, so an
image may be padded further here, or made smaller to fit at all. FDConv layers average over
the padding too, so both change the answer somewhat, and the answer says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import SIZE_DIVISOR, Preprocessing
from fdconv_deploy.runtime.preprocessing import FitDone, fitting_size, published_size


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
