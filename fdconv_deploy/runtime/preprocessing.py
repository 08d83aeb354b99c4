"""Pixels to the network's input, with the arithmetic of the published pipelines.

Published: keep-ratio resize (``mmcv.imrescale``: cv2 bilinear on uint8), then
``(rgb - mean) / std`` in float32. A bundle's graph has one static size, so an image whose
resize is not that size must be fitted to it. FDConv layers build their kernels from an
average over the whole image: both ways of fitting change the answer, everywhere in the
image, and the answer says which was used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from fdconv_deploy.architecture import Preprocessing
from fdconv_deploy.errors import ImageError

from .decoding import (
    FORMATS,
    MAX_PIXELS,
    ImageTooLargeError,
    UnsupportedImageError,
    read_image,
)
from .manifest import Fit

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "FitDone",
    "ImageTooLargeError",
    "Placement",
    "UnsupportedImageError",
    "check_image",
    "fitting_size",
    "keep_ratio_size",
    "normalise",
    "place",
    "published_size",
    "read_image",
    "resize",
]

FitDone = Literal["exact", "stretch", "pad"]


@dataclass(frozen=True)
class Placement:
    """How an image was put into a network's input.

    ``fit``: "exact", its keep-ratio resize is the input's size, as published; "stretch",
    its proportions were changed; "pad", it lies at the top left, and the rest of the input
    holds the mean colour. ``height``, ``width``: the pixels of the input it covers.
    """

    fit: FitDone
    height: int
    width: int


def check_image(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """``image`` itself, when it is (H, W, 3) uint8 with at least one pixel.

    :raises ImageError: it is not.
    """
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] != 3
        or image.size == 0
    ):
        found = (
            f"{image.shape} {image.dtype}"
            if isinstance(image, np.ndarray)
            else type(image).__name__
        )
        raise ImageError(
            f"An image must be a numpy array (H, W, 3) uint8 in RGB order, found {found}. "
            "read_image makes one from a file."
        )
    return image


def keep_ratio_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) ``mmcv.imrescale`` gives an image for ``scale``, in any order.

    The longer side stays within the larger number and the shorter side within the smaller.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return _scaled(height, factor), _scaled(width, factor)


def published_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """The (height, width) the published pipeline resizes an image to; its own without a scale.

    ``scale`` is (width, height) in pixels where ``keep_ratio`` is off, as in mmcv.
    """
    if preprocessing.scale is None:
        return height, width
    if not preprocessing.keep_ratio:
        return preprocessing.scale[1], preprocessing.scale[0]
    return keep_ratio_size(height, width, preprocessing.scale)


def fitting_size(size: tuple[int, int], network: tuple[int, int]) -> tuple[int, int]:
    """The largest (H, W) an image of ``size`` can have within ``network``, in its proportions."""
    factor = min(network[0] / size[0], network[1] / size[1])
    return min(_scaled(size[0], factor), network[0]), min(_scaled(size[1], factor), network[1])


def place(
    size: tuple[int, int], network: tuple[int, int], preprocessing: Preprocessing, fit: Fit
) -> Placement:
    """Decide how an image of ``size`` goes into an input of ``network``, both (H, W)."""
    inside = fitting_size(size, network)
    # Rounding can part the two by a pixel; either way proportions are kept.
    if network in (inside, published_size(*size, preprocessing)):
        return Placement("exact", *network)
    if fit == "stretch":
        return Placement("stretch", *network)
    return Placement("pad", *inside)


def resize(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """(h, w, 3) uint8 to (height, width, 3) uint8, cv2 bilinear as published."""
    if image.shape[:2] == (height, width):
        return image
    resized = cv2.resize(
        np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR
    )
    return np.asarray(resized, dtype=np.uint8)


def normalise(
    image: npt.NDArray[np.uint8],
    preprocessing: Preprocessing,
    size: tuple[int, int] | None = None,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """(h, w, 3) uint8 RGB to (3, H, W) float32: ``(image - mean) / std``, zeros where padded.

    :param size: the (H, W) of the result, at least the image's (its own, when not given);
        the image lies at the top left.
    :param out: a (3, H, W) float32 array to write into.
    """
    height, width = image.shape[:2]
    full = size or (height, width)
    if out is None:
        out = np.empty((3, *full), dtype=np.float32)
    values = np.arange(256, dtype=np.float32)
    for channel in range(3):
        # 256 answers, looked up: the same float32 operations as on every pixel, faster.
        mean = np.float32(preprocessing.mean[channel])
        std = np.float32(preprocessing.std[channel])
        source = channel if preprocessing.bgr_to_rgb else 2 - channel
        plane = out[channel]
        plane[:height, :width] = ((values - mean) / std)[image[:, :, source]]
        plane[height:] = 0
        plane[:height, width:] = 0
    return out


def _scaled(length: int, factor: float) -> int:
    # mmcv rounds like this; the lower bound is ours, for slivers that would vanish.
    return max(1, int(length * float(factor) + 0.5))
