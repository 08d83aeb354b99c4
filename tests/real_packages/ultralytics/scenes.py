"""Small synthetic data sets in Ultralytics' formats: rotated red and blue rectangles on gray."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

SIDE = 96
NAMES = {0: "red", 1: "blue"}
_BGR = {0: (40, 40, 220), 1: (220, 60, 40)}


def draw(seed: int, most: int = 3) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """An image (96, 96, 3) uint8 BGR, and class and corners (4, 2) in pixels of what is on it."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 140, (SIDE, SIDE, 3), dtype=np.uint8)
    objects = []
    for place in range(rng.integers(1, most + 1)):
        label = int(rng.integers(2))
        centre = (24 + 48 * (place % 2) + rng.uniform(-5, 5), 24 + 48 * (place // 2))
        size = tuple(rng.uniform(18, 34, 2))
        corners = cv2.boxPoints((centre, size, float(rng.uniform(0, 90)))).clip(0, SIDE - 1)
        cv2.fillPoly(image, [corners.round().astype(np.int32)], _BGR[label])
        objects.append((label, corners))
    return image, objects


def _line(task: str, label: int, corners: np.ndarray) -> str:
    share = corners / SIDE
    low, high = share.min(0), share.max(0)
    box = [*(low + high) / 2, *(high - low)]
    numbers = {
        "detect": box,
        "segment": share.ravel(),
        "obb": share.ravel(),
        "pose": [*box, *np.column_stack([share, np.full(4, 2)]).ravel()],
    }[task]
    return " ".join([str(label), *(f"{number:.5f}" for number in numbers)])


def write(task: str, folder: Path, count: int) -> Path:
    """A data set of a task; what ``train(data=...)`` takes."""
    for seed in range(count):
        image, objects = draw(seed, 1 if task == "classify" else 3)
        if task == "classify":
            for part in ("train", "val"):
                place = folder / part / NAMES[objects[0][0]]
                place.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(place / f"{seed}.png"), image)
            continue
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "labels").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / "images" / f"{seed}.png"), image)
        lines = [_line(task, label, corners) for label, corners in objects]
        (folder / "labels" / f"{seed}.txt").write_text("\n".join(lines))
    if task == "classify":
        return folder
    names = "\n".join(f"  {number}: {name}" for number, name in NAMES.items())
    keypoints = "kpt_shape: [4, 3]\n" if task == "pose" else ""
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\n{keypoints}names:\n{names}\n")
    return data
