"""Inputs to compare detectors on: pictures placed at the top left, as the runtime places them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from fdconv_deploy.export.validation.sample_inputs import Picture
from torch import Tensor

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.runtime.detection import place_whole
from fdconv_deploy.runtime.preprocessing import normalise, resize
from fdconv_deploy.sample_images import sample_image

# Shares of the input's height and width that made-up pictures cover, one after the other: the
# padding and the clipping of boxes are compared, too.
_COVERED = ((1.0, 0.875), (0.75, 1.0), (1.0, 1.0))


def made_up_detector_inputs(
    batch: int, size: tuple[int, int], preprocessing: Preprocessing, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Packaged pictures that cover different parts of the input.

    Returns:
        ``images`` ``(batch, 3, height, width)`` and ``sizes`` ``(batch, 2)``, float32. The same
        for the same arguments.
    """
    pictures = []
    for number in range(batch):
        height, width = (
            int(length * share)
            for length, share in zip(size, _COVERED[number % len(_COVERED)], strict=True)
        )
        pictures.append(sample_image(seed * batch + number, (height, width)))
    return _stacked(pictures, size, preprocessing)


def placed(
    pictures: Sequence[Picture], size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[Tensor, Tensor]:
    """HxWx3 uint8 RGB pictures of any size, resized as published, or to fit."""
    resized = []
    for picture in pictures:
        place = place_whole((picture.shape[0], picture.shape[1]), size, preprocessing)
        resized.append(resize(picture, place.height, place.width))
    return _stacked(resized, size, preprocessing)


def _stacked(
    pictures: Sequence[Picture], size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[Tensor, Tensor]:
    images = np.stack([normalise(picture, preprocessing, size) for picture in pictures])
    sizes = np.array([picture.shape[:2] for picture in pictures], np.float32)
    return torch.from_numpy(images), torch.from_numpy(sizes)
