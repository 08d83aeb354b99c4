"""COCO files as labelme2coco and supervision write them, for tests/benchmark/detection.

    python tests/real_packages/coco_exporters/make.py      # see README.md

Nothing of this project is imported.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import labelme2coco
import numpy as np
import supervision
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
SIZE = (96, 64)  # width, height

# Each image's shapes, as labelme has them.
SHAPES = [
    [
        ("car", "polygon", [[10, 12], [40.5, 10], [44, 30], [8, 33.25]]),
        ("person", "rectangle", [[60, 8], [72, 50]]),
    ],
    [
        ("person", "circle", [[40, 30], [52, 30]]),
        ("sign", "line", [[10, 10], [60, 40]]),
        ("sign", "point", [[80, 20]]),
    ],
    [("car", "polygon", [[5, 5], [30, 5], [30, 5], [5, 5]])],
]


def image(number: int) -> Image.Image:
    made = Image.new("RGB", SIZE, (90, 90, 90))
    ImageDraw.Draw(made).rectangle((10, 10, 20 + 5 * number, 40), (200, 30, 30))
    return made


def write_labelme2coco() -> None:
    """In its own way: paths from where it was called, boxes and polygons in one file."""
    folder = HERE / "labelme2coco"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "labelled").mkdir(parents=True)
    for number, shapes in enumerate(SHAPES):
        image(number).save(folder / "labelled" / f"{number}.png")
        told = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [
                {
                    "label": label,
                    "points": points,
                    "group_id": None,
                    "shape_type": kind,
                    "flags": {},
                }
                for label, kind, points in shapes
            ],
            "imagePath": f"{number}.png",
            "imageData": None,
            "imageHeight": SIZE[1],
            "imageWidth": SIZE[0],
        }
        (folder / "labelled" / f"{number}.json").write_text(json.dumps(told))
    os.chdir(folder)
    labelme2coco.convert("labelled", ".")
    for file in (folder / "labelled").glob("*.json"):
        file.unlink()


def write_supervision() -> None:
    """Masks: one piece, two pieces, one with a hole, a dot, and one of nothing."""
    folder = HERE / "supervision"
    shutil.rmtree(folder, ignore_errors=True)
    paths, found = [], {}
    for number in range(2):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        path = folder / "images" / f"{number}.png"
        image(number).save(path)
        paths.append(str(path))
        masks = np.zeros((5, SIZE[1], SIZE[0]), bool)
        masks[0, 10:40, 10:30] = True
        masks[1, 5:20, 40:55] = masks[1, 30:50, 40:70] = True
        masks[2, 8:50, 60:90] = True
        masks[2, 20:30, 70:80] = False
        masks[3, 60, 3] = True
        boxes = np.array(
            [[10, 10, 30, 40], [40, 5, 70, 50], [60, 8, 90, 50], [3, 60, 4, 61], [1, 1, 2, 2]],
            np.float64,
        )
        found[str(path)] = supervision.Detections(
            xyxy=boxes, mask=masks, class_id=np.array([0, 1, 2, 0, 1])
        )
    data = supervision.DetectionDataset(
        classes=["person", "car", "sign"], images=paths, annotations=found
    )
    data.as_coco(annotations_path=str(folder / "annotations.json"))


if __name__ == "__main__":
    write_labelme2coco()
    write_supervision()
