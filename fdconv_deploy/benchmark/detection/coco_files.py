"""A data set annotated as COCO is: one JSON file of objects, and a folder of images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.benchmark.datasets import DatasetError
from fdconv_deploy.runtime.decoding import read_image

# What each entry of a list must have.
_NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id", "bbox", "area"),
}


@dataclass(frozen=True)
class CocoSample:
    """``image`` (H, W, 3) uint8 RGB, of the file ``name``; ``number`` is its id in the JSON."""

    name: str
    number: int
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class CocoSet:
    """Annotated images. Make one with `read_coco`.

    ``truth``: the JSON, of the images taken alone. ``has_masks``: every object has one.
    """

    annotations: Path
    images: Path
    truth: dict[str, Any]
    has_masks: bool

    def __len__(self) -> int:
        return len(self.truth["images"])

    def __iter__(self) -> Iterator[CocoSample]:
        """Each image, decoded when its turn comes.

        :raises ImageError: it cannot be read.
        :raises DatasetError: it is not of the size that the JSON says.
        """
        for entry in self.truth["images"]:
            path = self.images / entry["file_name"]
            image = read_image(path)
            if image.shape[:2] != (entry["height"], entry["width"]):
                raise DatasetError(
                    f"The image {path} is {image.shape[0]}x{image.shape[1]} (height x width), and "
                    f"{self.annotations} says {entry['height']}x{entry['width']}. Give the images "
                    "that were annotated."
                )
            yield CocoSample(entry["file_name"], entry["id"], image)

    def category_ids(self, classes: Sequence[str]) -> list[int]:
        """The category that each of a network's classes is, by name.

        :raises DatasetError: the JSON has no category of some class's name.
        """
        known = {entry["name"]: entry["id"] for entry in self.truth["categories"]}
        lacking = [name for name in classes if name not in known]
        if lacking:
            raise DatasetError(
                f"The network's class {lacking[0]!r} is none of the categories of "
                f"{self.annotations} ({', '.join(list(known)[:6])}, …): {len(lacking)} of "
                f"{len(classes)} classes are not. Give its own data set, or name the classes as "
                "there when exporting."
            )
        return [known[name] for name in classes]


def find_coco(root: Path) -> tuple[Path, Path] | None:
    """The annotations and images of a folder laid out as COCO's; None when it is not.

    ``annotations/instances_NAME.json`` with a folder ``NAME`` beside ``annotations``, or in a
    folder ``images`` there. Of several, the one for validation.

    :raises DatasetError: there are several, and none has "val" in its name.
    """
    found = []
    for file in sorted((root / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_")
        for images in (root / name, root / "images" / name):
            if images.is_dir():
                found.append((file, images))
                break
    validating = [pair for pair in found if "val" in pair[0].stem]
    if len(found) > 1 and len(validating) != 1:
        raise DatasetError(
            f"{root} has several annotated parts ({', '.join(f.name for f, _ in found)}). Give one "
            "with --annotations and --images."
        )
    return next(iter(validating or found), None)


def read_coco(annotations: Path, images: Path, limit: int | None = None) -> CocoSet:
    """Read an annotation file.

    :param images: the folder that its file names are in.
    :param limit: take the first so many images alone.
    :raises DatasetError: the file is not one of COCO's, or the folder is missing.
    """
    if not images.is_dir():
        raise DatasetError(f"A folder of images was expected, but {images} is none.")
    if not annotations.is_file():
        raise DatasetError(f"A file of annotations was expected, but {annotations} is none.")
    try:
        told = json.loads(annotations.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"The annotations {annotations} are not JSON: {error}.") from error
    _check(told, annotations)
    taken = sorted(told["images"], key=lambda entry: entry["id"])[:limit]
    numbers = {entry["id"] for entry in taken}
    # Numbered anew from 1: to pycocotools an object of number 0 is none.
    objects = [
        {"iscrowd": 0, **entry, "id": number}
        for number, entry in enumerate(
            (e for e in told["annotations"] if e["image_id"] in numbers), 1
        )
    ]
    if not objects:
        raise DatasetError(f"The annotations {annotations} hold no objects in {len(taken)} images.")
    truth = {"images": taken, "annotations": objects, "categories": told["categories"]}
    return CocoSet(annotations, images, truth, all(entry.get("segmentation") for entry in objects))


def _check(told: Any, path: Path) -> None:
    for name, fields in _NEEDED.items():
        entries = told.get(name) if isinstance(told, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DatasetError(
                f"The annotations {path} have no list of {name}; expected an instances file of "
                "COCO, with images, annotations and categories."
            )
        for number, entry in enumerate(entries):
            lacking = [field for field in fields if field not in entry]
            if lacking:
                raise DatasetError(
                    f"The annotations {path}: number {number} of {name} has no {lacking[0]!r}."
                )
    for number, entry in enumerate(told["annotations"]):
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise DatasetError(
                f"The annotations {path}: number {number} has the bbox {box!r}, where [x, y, "
                "width, height] was expected."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
