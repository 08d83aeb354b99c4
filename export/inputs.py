"""Inputs to compare networks on: pictures of something, as a camera could have taken them.

Comparing on noise would not do. Its global averages lie far from those of any photograph,
the attentions they drive run to their ends, and a trained network (the demo's, for one) may
then amplify rounding until it hides errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdconv_deploy.architecture import Preprocessing
from fdconv_deploy.demo.scenes import draw_scene
from fdconv_deploy.runtime.preprocessing import normalise

# A scene is drawn no smaller than this and then shrunk: there is no street in a few pixels.
SMALLEST_SCENE = 64

Picture = NDArray[np.uint8]


def made_up_images(
    batch: int,
    size: tuple[int, int],
    preprocessing: Preprocessing | None = None,
    *,
    channels: int = 3,
    seed: int = 0,
) -> Tensor:
    """Drawn street scenes, normalised as the network's own images.

    Args:
        size: height and width in pixels.
        preprocessing: of the network; the published one if not given.
        channels: the first of these are the scene's; more repeat them.

    Returns:
        ``(batch, channels, height, width)`` float32. The same for the same arguments.
    """
    drawn = max(size[0], SMALLEST_SCENE), max(size[1], SMALLEST_SCENE)
    scenes = []
    for number in range(batch):
        picture, _ = draw_scene(1_000 * seed + number, *drawn)
        if drawn != size:
            picture = _resized(picture, size, cv2.INTER_AREA)
        scenes.append(picture)
    tensor = normalised(scenes, size, preprocessing)
    return tensor[:, torch.arange(channels) % 3].contiguous()


def normalised(
    pictures: Sequence[Picture], size: tuple[int, int], preprocessing: Preprocessing | None = None
) -> Tensor:
    """HxWx3 uint8 RGB pictures of any size -> ``(B, 3, height, width)`` float32."""
    resized = [_resized(picture, size, cv2.INTER_LINEAR) for picture in pictures]
    planes = [normalise(picture, preprocessing or Preprocessing()) for picture in resized]
    return torch.from_numpy(np.stack(planes))


def _resized(picture: Picture, size: tuple[int, int], method: int) -> Picture:
    return np.asarray(cv2.resize(picture, size[::-1], interpolation=method), dtype=np.uint8)
