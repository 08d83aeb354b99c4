"""Drawn streets for detectors: every person, car and sign by itself, and as COCO has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.streets.classes import CAR, PALETTE, PERSON, POLE, THINGS
from examples.streets.scenes import HEIGHT, WIDTH, draw
from fdconv_deploy.coco_rle import encode

__all__ = ["CLASSES", "COLOURS", "SMALLEST", "Instances", "coco_annotations", "draw_instances"]

CLASSES = THINGS
COLOURS = (PALETTE[PERSON], PALETTE[CAR], PALETTE[POLE])
# Fewer visible pixels than this can't be told from noise, by anyone: not an instance.
SMALLEST = 24


@dataclass(frozen=True)
class Instances:
    """The things of a scene, nearest last.

    ``boxes`` (N, 4) float32: x1 y1 x2 y2 in pixels, the edges of the outermost pixels.
    ``labels`` (N,) int64: indices into ``CLASSES``. ``masks`` (N, H, W) bool: what is seen of
    each, so no two overlap.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)


def draw_instances(
    seed: int, height: int = HEIGHT, width: int = WIDTH
) -> tuple[NDArray[np.uint8], Instances]:
    """The image of `draw_scene` for the same arguments, and the things that are seen in it.

    A thing with fewer than ``SMALLEST`` visible pixels is left out.
    """
    rgb, canvas = draw(seed, height, width)
    seen = np.bincount(canvas.things.ravel(), minlength=len(canvas.kinds) + 1)[1:]
    (kept,) = np.nonzero(seen >= SMALLEST)
    masks = canvas.things == (kept + 1)[:, None, None]
    labels = np.array([CLASSES.index(canvas.kinds[n]) for n in kept], np.int64)
    return rgb, Instances(boxes_of(masks), labels, masks)


def boxes_of(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """``(N, H, W)`` masks, none empty -> ``(N, 4)`` float32, x1 y1 x2 y2 round their pixels."""
    ends = []
    for axis in (1, 2):  # over rows: columns, then the other way round
        some: NDArray[np.bool_] = np.any(masks, axis)
        ends.append((some.argmax(1), some.shape[1] - some[:, ::-1].argmax(1)))
    (left, right), (top, bottom) = ends
    return np.stack([left, top, right, bottom], 1).astype(np.float32)


def coco_annotations(scenes: Iterable[tuple[str, Instances]]) -> dict[str, Any]:
    """The content of a COCO annotation file, for JSON.

    Args:
        scenes: an image's file name and what is in it, each. Ids count from 1.

    Masks are compressed run lengths, not polygons: they are exact, and parts on both sides of
    a lamp belong together.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, found in scenes:
        height, width = found.masks.shape[1:]
        images.append({"id": len(images) + 1, "file_name": name, "height": height, "width": width})
        for box, label, mask in zip(found.boxes, found.labels, found.masks, strict=True):
            left, top, right, bottom = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": int(label) + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode(mask),
                }
            )
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}
