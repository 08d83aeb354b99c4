"""Packaged pictures, and as networks take them: what graphs are compared on and timed with.

Six street scenes of 384x768 pixels, drawn by ``examples/streets/scenes.py`` (seeds 7,000,000 to
7,000,005): of training's range of seeds, at another size. They score no network.

Comparing on noise would not do. Its global averages lie far from those of any photograph, the
attentions they drive run to their ends, and a trained network may then amplify rounding until it
hides errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.runtime.images import read_image
from fdconv_deploy.runtime.manifest import Manifest, TensorSpec
from fdconv_deploy.runtime.preprocessing import check_image, normalise, resize, scene_bands

COUNT = 6
# Shares of a detector's input that pictures cover, one after the other: its padding and the
# clipping of boxes are compared, too.
_COVERED = ((1.0, 0.875), (0.75, 1.0), (1.0, 1.0))


def sample_image(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A packaged picture cropped and resized to a (height, width): (height, width, 3) uint8 RGB.

    ``number`` tells which, from 0. Past the last one the pictures come again, mirrored, and after
    that cropped elsewhere: the same number always gives the same pixels.
    """
    picture: NDArray[Any] = _picture(number % COUNT)
    again = number // COUNT
    if again % 2:
        picture = picture[:, ::-1]
    height, width = size
    rows, columns = picture.shape[:2]
    scale = min(rows / height, columns / width)
    crop = max(1, round(height * scale)), max(1, round(width * scale))
    # Of a crop that leaves much out, another part each time: the golden ratio never repeats one.
    along = (0.5 + 0.6180339887 * (number // (2 * COUNT))) % 1.0
    top, left = (
        round((whole - part) * along) for whole, part in zip((rows, columns), crop, strict=True)
    )
    cut = np.ascontiguousarray(picture[top : top + crop[0], left : left + crop[1]])
    shrinks = crop[0] > height or crop[1] > width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(cut, (width, height), interpolation=how), np.uint8)


@cache
def _picture(number: int) -> NDArray[np.uint8]:
    return read_image(Path(__file__).parent / f"{number}.jpg")


def sample_batch(
    batch: int, size: tuple[int, int], preprocessing: Preprocessing | None = None, *, seed: int = 0
) -> NDArray[np.float32]:
    """Packaged pictures as a network takes them: ``(batch, channels, height, width)``.

    ``preprocessing`` is the published one if not given, for other bands see `scene_bands`; ``seed``
    tells which pictures.
    """
    how = preprocessing or Preprocessing()
    scenes = (scene_bands(sample_image(seed * batch + n, size), how) for n in range(batch))
    return prepared_batch(scenes, size, how)


def prepared_batch(
    pictures: Iterable[NDArray[Any]],
    size: tuple[int, int],
    preprocessing: Preprocessing | None = None,
) -> NDArray[np.float32]:
    """Images of any size, as `check_image` takes them -> ``(B, C, height, width)``."""
    how = preprocessing or Preprocessing()
    resized = (resize(check_image(picture, how), *size, how.resample) for picture in pictures)
    return np.stack([normalise(image, how) for image in resized])


def sample_detector_batch(
    batch: int, size: tuple[int, int], preprocessing: Preprocessing, *, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pictures that cover different parts of a detector's input, by ``seed`` as `sample_batch`.

    They are ``images`` ``(batch, 3, height, width)`` and ``sizes`` ``(batch, 2)``.
    """
    covered = (_COVERED[number % len(_COVERED)] for number in range(batch))
    sizes = [(int(size[0] * rows), int(size[1] * columns)) for rows, columns in covered]
    pictures = [sample_image(seed * batch + n, each) for n, each in enumerate(sizes)]
    images = np.stack([normalise(picture, preprocessing, size) for picture in pictures])
    return images, np.array(sizes, np.float32)


def manifest_feeds(
    manifest: Manifest, batch: int, *, image: NDArray[Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs for a bundle's graph of a batch size, by name. See `sample_feeds`."""
    described = manifest.architecture or manifest.detector
    preprocessing = described.preprocessing if described else None
    return sample_feeds(manifest.inputs[batch], preprocessing, image=image)


def sample_feeds(
    specs: Iterable[TensorSpec],
    preprocessing: Preprocessing | None = None,
    *,
    image: NDArray[Any] | None = None,
    vary_sizes: bool = False,
) -> dict[str, NDArray[Any]]:
    """Inputs for a graph, by name.

    Args:
        specs: of the graph's inputs. ``(B, C, H, W)`` float32 of the network's bands take
            pictures, a detector's ``sizes`` ``(B, 2)`` their sizes; other inputs of floats take
            normal numbers from a fixed seed, and of integers zeros.
        preprocessing: of the network; the published one if not given.
        image: what every picture is, in place of the packaged ones.
        vary_sizes: whether a detector's pictures leave parts of its input empty, as a comparison
            needs them; otherwise they fill it, as timing does.
    """
    how = preprocessing or Preprocessing()
    random = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    for spec in specs:
        if len(spec.shape) == 4 and spec.shape[1] == how.channels and spec.dtype == "float32":
            batch, _, *size = spec.shape
            sizes = np.full((batch, 2), size, np.float32)
            if image is not None:
                found[spec.name] = prepared_batch([image] * batch, (size[0], size[1]), how)
            elif vary_sizes:
                found[spec.name], sizes = sample_detector_batch(batch, (size[0], size[1]), how)
            else:
                found[spec.name] = sample_batch(batch, (size[0], size[1]), how)
        elif spec.name == "sizes" and found:
            found[spec.name] = sizes
        elif np.dtype(spec.dtype).kind == "f":
            found[spec.name] = random.standard_normal(spec.shape).astype(spec.dtype)
        else:
            found[spec.name] = np.zeros(spec.shape, spec.dtype)
    return found
