"""What is run: a picture from a file, or scenes drawn for the purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.architecture import Preprocessing
from fdconv_deploy.demo.scenes import draw_scene
from fdconv_deploy.runtime.decoding import read_image
from fdconv_deploy.runtime.manifest import TensorSpec
from fdconv_deploy.runtime.preprocessing import normalise

SMALLEST = 64


def picture(size: tuple[int, int], image: str | None = None, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 RGB of exactly that size.

    :param image: a file; a scene is drawn from ``seed`` when not given.
    """
    if image is None:
        drawn = draw_scene(1000 + seed, max(size[0], SMALLEST), max(size[1], SMALLEST))[0]
    else:
        drawn = read_image(Path(image))
    if drawn.shape[:2] == size:
        return drawn
    return np.asarray(cv2.resize(drawn, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def feeds(
    specs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None, image: str | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs for a graph, by name.

    Images ``(B, 3, H, W)`` float32 hold pictures, normalised; ``sizes`` ``(B, 2)`` that all of
    each is a picture; whatever else there is, small numbers from a fixed seed.
    """
    random = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    height = width = 0
    for spec in specs:
        if len(spec.shape) == 4 and spec.shape[1] == 3 and spec.dtype == "float32":
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
    """(batch, 3, height, width) float32 normalised."""
    how = preprocessing or Preprocessing()
    return np.stack([normalise(picture(size, image, number), how) for number in range(batch)])
