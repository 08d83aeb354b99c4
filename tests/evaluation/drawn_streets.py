"""Drawn streets with their things, and what was drawn as if it had been found."""

from __future__ import annotations

import numpy as np

from examples.streets.instances import Instances, draw_instances
from fdconv_deploy.runtime import Detection

SEEDS = (3, 4, 5)


def drawn() -> list[tuple[np.ndarray, Instances]]:
    return [draw_instances(seed) for seed in SEEDS]


def as_found(
    things: Instances, size: tuple[int, int], scores: np.ndarray | None = None
) -> Detection:
    """What was drawn as if it had been found, its masks as fine as its boxes."""
    count = len(things)
    masks = [
        mask[int(y1) : int(y2), int(x1) : int(x2)]
        for mask, (x1, y1, x2, y2) in zip(things.masks, things.boxes, strict=True)
    ]
    # Detections hold masks of one size: each pixel of a box is a block of its mask's.
    fine = np.zeros((count, 84, 84), np.float32)
    for slot, mask in zip(fine, masks, strict=True):
        rows = (np.arange(84) + 0.5) * mask.shape[0] / 84
        columns = (np.arange(84) + 0.5) * mask.shape[1] / 84
        slot[:] = mask[rows.astype(int)[:, None], columns.astype(int)]
    return Detection(
        things.boxes,
        np.ones(count, np.float32) if scores is None else scores,
        things.labels,
        fine,
        0.5,
        size,
        size,
        ("person", "car", "sign"),
        ((200, 0, 0),) * 3,
        "resized",
        {"inference": 0.1},
    )
