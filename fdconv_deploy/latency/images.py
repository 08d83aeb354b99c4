"""What is run: an image file, or a packaged picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.runtime.manifest import TensorSpec
from fdconv_deploy.runtime.multiband import load_image
from fdconv_deploy.runtime.preprocessing import check_image, resize, scene_bands
from fdconv_deploy.sample_images import sample_image
from fdconv_deploy.sample_images.inputs import prepared_batch, sample_batch, sample_feeds


def picture(
    size: tuple[int, int],
    preprocessing: Preprocessing | None = None,
    image: str | None = None,
    seed: int = 0,
) -> NDArray[Any]:
    """(height, width, C) of exactly that size, as a network takes it; uint8 RGB mostly.

    Args:
        size: height and width in pixels.
        preprocessing: of the network; one of photographs when not given.
        image: a file; the packaged picture number ``seed`` when not given.
        seed: number of the packaged picture.
    """
    how = preprocessing or Preprocessing()
    if image is None:
        return scene_bands(sample_image(seed, size), how)
    return resize(check_image(load_image(Path(image), how), how), *size)


def feeds(
    specs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None, image: str | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs for a graph, by name, see `sample_feeds`; each picture fills its input.

    Args:
        specs: of the graph's inputs.
        preprocessing: of the network; one of photographs when not given.
        image: a file that all pictures are; packaged pictures when not given.
    """
    found = None if image is None else load_image(Path(image), preprocessing or Preprocessing())
    return sample_feeds(specs, preprocessing, image=found)


def images(
    batch: int, size: tuple[int, int], preprocessing: Preprocessing | None, image: str | None = None
) -> NDArray[np.float32]:
    """(batch, C, height, width) float32 normalised."""
    if image is None:
        return sample_batch(batch, size, preprocessing)
    return prepared_batch([picture(size, preprocessing, image)] * batch, size, preprocessing)
