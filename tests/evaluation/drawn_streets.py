"""Drawn streets with their things, written out as COCO has its own on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.streets.instances import Instances, coco_annotations, draw_instances
from fdconv_deploy.runtime import Detection
from tests.runtime import toy_detector

SEEDS = (3, 4, 5)


def drawn() -> list[tuple[np.ndarray, Instances]]:
    return [draw_instances(seed) for seed in SEEDS]


@pytest.fixture(scope="package")
def street_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``annotations/instances_val2017.json`` and ``val2017``, and a training part beside it."""
    root = tmp_path_factory.mktemp("coco")
    scenes = []
    for part in ("train2017", "val2017"):
        (root / part).mkdir()
        (root / "annotations").mkdir(exist_ok=True)
        scenes = []
        for number, (image, things) in enumerate(drawn()):
            Image.fromarray(image).save(root / part / f"{number:012d}.png")
            scenes.append((f"{number:012d}.png", things))
        file = root / "annotations" / f"instances_{part}.json"
        file.write_text(json.dumps(coco_annotations(scenes)))
    (root / "annotations" / "captions_val2017.json").write_text("{}")
    return root


@pytest.fixture(scope="package")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy detector's bundle that names the streets' things."""
    from examples.streets.instances import CLASSES

    arch = toy_detector.architecture(classes=CLASSES)
    path = tmp_path_factory.mktemp("detector") / "toy"
    return toy_detector.make_bundle(path, arch=arch).path


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
