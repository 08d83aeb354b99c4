"""Drawn streets as batches: images, and what is to be found in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.streets.instances import Instances, boxes_of, draw_instances


@dataclass(frozen=True)
class Scene:
    """``rgb`` (H, W, 3) uint8; ``things`` (H, W) uint8: n where thing n - 1 is seen, else 0.

    A twentieth of the masks' size; ``labels`` (N,) are the things' classes.
    """

    rgb: NDArray[np.uint8]
    things: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def mirrored(self) -> Scene:
        """Left and right changed."""
        return Scene(self.rgb[:, ::-1], self.things[:, ::-1], self.labels)

    def truth(self) -> Truth:
        """What is to be found."""
        masks = self.things == np.arange(1, len(self.labels) + 1)[:, None, None]
        return Truth(
            torch.from_numpy(boxes_of(masks)),
            torch.from_numpy(self.labels),
            torch.from_numpy(masks.astype(np.float32)),
        )


@dataclass(frozen=True)
class Truth:
    """``boxes`` (N, 4) float32 x1 y1 x2 y2, ``labels`` (N,) int64, ``masks`` (N, H, W) 0 or 1."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


def as_scene(rgb: NDArray[np.uint8], found: Instances) -> Scene:
    """A drawn street, its masks in one map."""
    numbers = np.arange(1, len(found) + 1, dtype=np.uint8)
    return Scene(rgb, (found.masks * numbers[:, None, None]).sum(0, dtype=np.uint8), found.labels)


def draw_scene(seed: int) -> Scene:
    """Scene number ``seed``."""
    return as_scene(*draw_instances(seed))


def images_of(scenes: Sequence[Scene]) -> Tensor:
    """RGB 0..255 float32, ``(B, 3, H, W)``."""
    stacked = np.stack([scene.rgb for scene in scenes]).transpose(0, 3, 1, 2)
    return torch.from_numpy(stacked.astype(np.float32))


def altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene mirrored or not, in another light."""
    if rng.random() < 0.5:
        scene = scene.mirrored()
    light = rng.uniform(0.8, 1.25) * rng.uniform(0.93, 1.07, 3)
    rgb = np.clip(scene.rgb * light.astype(np.float32), 0, 255).astype(np.uint8)
    return Scene(rgb, scene.things, scene.labels)
