"""What is run: an image file, or a packaged picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.runtime.manifest import TensorSpec
from fdconv_deploy.runtime.multiband import load_image
from fdconv_deploy.runtime.preprocessing import check_image, normalise, resize, scene_bands
from fdconv_deploy.sample_images import sample_image


def picture(
    size: tuple[int, int],
    preprocessing: Preprocessing | None = None,
    image: str | None = None,
    seed: int = 0,
) -> NDArray[Any]:
    """(height, width, C) of exactly that size, as a network takes it; uint8 RGB mostly.

    :param preprocessing: of the network; one of photographs when not given.
    :param image: a file; the packaged picture number ``seed`` when not given.
    """
    how = preprocessing or Preprocessing()
    if image is not None and how.loading != "color":
        return resize(check_image(load_image(Path(image), how), how), *size)
    if image is None:
        return scene_bands(sample_image(seed, size), how)
    pixels = load_image(Path(image), how)
    if pixels.shape[:2] != size:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8)
    return scene_bands(pixels, how)


def feeds(
    specs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None, image: str | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs for a graph, by name.

    Images ``(B, C, H, W)`` float32 hold pictures, normalised; ``sizes`` ``(B, 2)`` that all of
    each is a picture; whatever else there is, small numbers from a fixed seed.
    """
    random = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    height = width = 0
    channels = (preprocessing or Preprocessing()).channels
    for spec in specs:
        if len(spec.shape) == 4 and spec.shape[1] == channels and spec.dtype == "float32":
            height, width = spec.shape[2:]
            found[spec.name] = images(spec.shape[0], (height, width), preprocessing, image)
        elif spec.name == "sizes" and height:
            found[spec.name] = np.full(spec.shape, (height, width), spec.dtype)
        elif np.dtype(spec.dtype).kind == "f":
            found[spec.name] = random.standard_normal(spec.shape).astype(spec.dtype)
        else:
            found[spec.name] = np.zeros(spec.shape, spec.dtype)
    return found


def images(
    batch: int, size: tuple[int, int], preprocessing: Preprocessing | None, image: str | None = None
) -> NDArray[np.float32]:
    """(batch, C, height, width) float32 normalised."""
    how = preprocessing or Preprocessing()
    return np.stack([normalise(picture(size, how, image, number), how) for number in range(batch)])
