"""Inputs to compare networks on: pictures of something, as a camera could have taken them.

Comparing on noise would not do. Its global averages lie far from those of any photograph,
the attentions they drive run to their ends, and a trained network (the demo's, for one) may
then amplify rounding until it hides errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.runtime.preprocessing import check_image, normalise, resize, scene_bands
from fdconv_deploy.sample_images import sample_image

Picture = NDArray[Any]


def made_up_images(
    batch: int,
    size: tuple[int, int],
    preprocessing: Preprocessing | None = None,
    *,
    seed: int = 0,
) -> Tensor:
    """Packaged pictures, normalised as the network's own images.

    Args:
        size: height and width in pixels.
        preprocessing: of the network; the published one if not given. For bands that are not a
            photograph's, see `scene_bands`.

    Returns:
        ``(batch, channels, height, width)`` float32. The same for the same arguments.
    """
    how = preprocessing or Preprocessing()
    scenes = [
        scene_bands(sample_image(seed * batch + number, size), how) for number in range(batch)
    ]
    return normalised(scenes, size, how)


def normalised(
    pictures: Sequence[Picture], size: tuple[int, int], preprocessing: Preprocessing | None = None
) -> Tensor:
    """Images of any size, as `check_image` takes them -> ``(B, C, height, width)`` float32."""
    how = preprocessing or Preprocessing()
    resized = (resize(check_image(picture, how), *size) for picture in pictures)
    return torch.from_numpy(np.stack([normalise(image, how) for image in resized]))
