"""COCO's data sets and scores: a JSON file of objects with a folder of images, and their AP.

Average precision is computed by COCO's own code, ``pycocotools`` (the extra ``coco``).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.checkpoints.config_parser import printable
from fdconv_deploy.evaluation.coco_annotations import Annotations, read_annotations
from fdconv_deploy.evaluation.datasets import DatasetError
from fdconv_deploy.evaluation.metrics import Score, defined
from fdconv_deploy.runtime import Detection
from fdconv_deploy.runtime.detection import SHOWN_SCORE
from fdconv_deploy.runtime.images import image_size, read_image

Kind = Literal["bbox", "segm"]
# Two objects of one class are the same from this intersection over union on.
_SAME = 0.9
# Of a character beyond 16 bits, of which JSON may hold one half.
_ESCAPED_HALF = re.compile(r"\\u[dD]")


@dataclass(frozen=True)
class CocoSample:
    """``image`` (H, W, 3) uint8 RGB, of the file ``name``; ``number`` is pycocotools' id of it."""

    name: str
    number: int
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class CocoSet:
    """Annotated images. Make one with `read_coco`."""

    annotations: Path  # the JSON file
    images: Path  # the folder of its images
    # Its images, categories and objects, for pycocotools, all numbered from 1: ids of a file may be
    # text and numbers mixed, which pycocotools cannot sort.
    truth: dict[str, Any]
    checked: Annotations  # what was found in its annotations

    @property
    def first(self) -> Path:
        """The first image's file."""
        return self.images / self.truth["images"][0]["file_name"]

    @property
    def notes(self) -> list[str]:
        """What of the annotations is left out, and what is odd."""
        return self.checked.notes()

    def score(self, classes: Sequence[str]) -> DetectionScore:
        """What counts the answers of a detector of these classes."""
        return DetectionScore(self, classes)

    def __len__(self) -> int:
        return len(self.truth["images"])

    def __iter__(self) -> Iterator[CocoSample]:
        """Each image, decoded when its turn comes; ``ImageError`` if it cannot be read."""
        for entry in self.truth["images"]:
            image = read_image(self.images / entry["file_name"])
            yield CocoSample(entry["file_name"], entry["id"], image)

    def category_ids(self, classes: Sequence[str]) -> list[int]:
        """The category of each of a network's classes; ``DatasetError`` if one has none, or two."""
        known = {entry["name"]: entry["id"] for entry in self.truth["categories"]}
        count = Counter(entry["name"] for entry in self.truth["categories"])
        lacking = [name for name in classes if name not in known]
        if lacking:
            raise DatasetError(
                f"The network's class {lacking[0]!r} is none of the categories of "
                f"{self.annotations} ({', '.join(list(known)[:6])}, …): {len(lacking)} of "
                f"{len(classes)} classes are not. Give its own data set, or name the classes as "
                "there when exporting."
            )
        for name in classes:
            if count[name] > 1:
                raise DatasetError(
                    f"{self.annotations} has {count[name]} categories named {name!r}, and it "
                    "cannot be known which is the network's. Give each category a name of its own."
                )
        return [known[name] for name in classes]


def find_coco(root: Path) -> tuple[Path, Path] | None:
    """The annotations and images of a folder laid out as COCO's; None when it is not.

    ``annotations/instances_NAME.json`` with a folder ``NAME`` beside ``annotations``, or in a
    folder ``images`` there. Of several, the one for validation; ``DatasetError`` where there is not
    one with "val" in its name.
    """
    found = []
    for file in sorted((root / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_")
        images = next(filter(Path.is_dir, (root / name, root / "images" / name)), None)
        if images is not None:
            found.append((file, images))
    validating = [pair for pair in found if "val" in pair[0].stem]
    if len(found) > 1 and len(validating) != 1:
        raise DatasetError(
            f"{root} has several annotated parts ({', '.join(f.name for f, _ in found)}). Give one "
            "with --annotations and --images."
        )
    return next(iter(validating or found), None)


def read_coco(annotations: Path, images: Path, limit: int | None = None) -> CocoSet:
    """Read an instances file of COCO, of whose ``images`` (a folder) the first ``limit`` count.

    Raises:
        DatasetError: the file is not one of COCO's, the folder is missing, an image is of
            another size than the file says, or no annotation can be scored.
        ImageError: an image is missing, or none.
    """
    if not images.is_dir():
        raise DatasetError(f"A folder of images was expected, but {images} is none.")
    if not annotations.is_file():
        raise DatasetError(f"A file of annotations was expected, but {annotations} is none.")
    try:
        # Windows' editors begin a file with a mark that JSON does not know.
        text = annotations.read_text(encoding="utf-8-sig")
        given = json.loads(text)
        if _ESCAPED_HALF.search(text):  # seldom, and millions of numbers need not be walked through
            given = printable(given)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"The annotations {annotations} are not JSON: {error}.") from error
    listed = _entries(given, "images", "file_name", annotations)
    named = _entries(given, "categories", "name", annotations)
    taken = _images(listed, images, annotations, limit)
    categories = {
        key: {"id": number, "name": entry["name"]}
        for number, (key, entry) in enumerate(named.items(), 1)
    }
    checked = read_annotations(_list(given, "annotations", annotations), taken, categories)
    scored = [image for image in taken.values() if image is not None]
    if not checked.objects:
        first = f" {checked.left_out[0]}" if checked.left_out else ""
        raise DatasetError(
            f"The annotations {annotations} hold no objects in {len(scored)} images that could be "
            f"scored.{first}"
        )
    truth = {"images": scored, "annotations": checked.objects}
    return CocoSet(annotations, images, {**truth, "categories": [*categories.values()]}, checked)


def _list(given: Any, name: str, path: Path) -> list[Any]:
    entries = given.get(name) if isinstance(given, dict) else None
    if not isinstance(entries, list):
        raise DatasetError(
            f"The annotations {path} have no list of {name}; expected an instances file of "
            "COCO, with images, annotations and categories."
        )
    return entries


def _entries(given: Any, name: str, field: str, path: Path) -> dict[Any, dict[str, Any]]:
    """The list ``name`` of a file's content by ids, in their order; each has a text ``field``."""
    found: dict[Any, dict[str, Any]] = {}
    for place, entry in enumerate(_list(given, name, path)):
        which = f"The annotations {path}: number {place} of {name}"
        if not isinstance(entry, dict):
            raise DatasetError(f"{which} is {reprlib.repr(entry)}; expected {{'id': …}}.")
        for needed in ("id", field):
            if needed not in entry:
                raise DatasetError(f"{which} has no {needed!r}.")
        key, text = entry["id"], entry[field]
        if not isinstance(key, str | int | float) or key != key:
            raise DatasetError(
                f"{which} has the id {reprlib.repr(key)}; expected a number (or a text)."
            )
        if not isinstance(text, str):
            raise DatasetError(f"{which} has the {field} {reprlib.repr(text)}; expected a text.")
        known = found.setdefault(key, entry)[field]
        if known != text:
            raise DatasetError(
                f"The annotations {path} have two {name} of the id {key!r}: {known!r} and "
                f"{text!r}. Give each an id of its own."
            )
    # In pycocotools' order, by which it settles equal scores: numbers and then texts.
    return dict(sorted(found.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))


def _images(
    entries: dict[Any, dict[str, Any]], folder: Path, path: Path, limit: int | None
) -> dict[Any, dict[str, Any] | None]:
    """Images for pycocotools by id, checked against their files; None for those over the limit."""
    found: dict[Any, dict[str, Any] | None] = {}
    taken: dict[str, str] = {}
    for number, (key, entry) in enumerate(entries.items(), 1):
        if limit is not None and number > limit:
            found[key] = None
            continue
        name = _within(folder, entry["file_name"])
        height, width = image_size(folder / name)
        # Not every exporter says how large an image is, and the files tell it.
        given = entry.get("height", height), entry.get("width", width)
        if given != (height, width):
            raise DatasetError(
                f"The image {folder / name} is {height}x{width} (height x width), and {path} says "
                f"{'x'.join(map(reprlib.repr, given))}. Give the images that were annotated."
            )
        if taken.setdefault(name, entry["file_name"]) != entry["file_name"]:
            raise DatasetError(
                f"The annotations {path} have {taken[name]} and {entry['file_name']}, and {folder} "
                f"has {name} alone for both. Give the folder that their paths begin in."
            )
        found[key] = {"id": number, "file_name": name, "height": height, "width": width}
    return found


def _within(folder: Path, name: str) -> str:
    """A file's name below the folder of images, as exporters have it in their ways.

    Some write it as a path on their machine, or from where they were called, or with Windows'
    separators: the longest end of it that is a file in the folder is taken.
    """
    if os.path.isfile(folder / name):  # noqa: PTH113 - a name may be none that a path can have
        return name
    parts = name.replace("\\", "/").split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end and os.path.isfile(folder / end)), name)  # noqa: PTH113


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's scores, 0 to 1; NaN where nothing annotated would count."""

    ap: float  # mean over IoU thresholds 0.50 to 0.95 and classes
    ap50: float  # at one threshold
    ap75: float
    small: float  # of objects below 32² pixels
    medium: float  # below 96² pixels
    large: float
    recall: float  # with at most 100 objects an image
    classes: tuple[float, ...]  # ``ap`` of each

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, without the classes; scores that are not defined are null."""
        return {name: defined(value) for name, value in vars(self).items() if name != "classes"}


class DetectionScore(Score[CocoSample, Detection]):
    """A detector's box and mask AP, of all the objects that it gives."""

    measure, unit = "AP", "objects"

    def __init__(self, data: CocoSet, classes: Sequence[str]) -> None:
        self.found: list[dict[str, Any]] = []  # as COCO's result files have them
        self._data, self._categories = data, data.category_ids(classes)
        self._has_masks = data.checked.has_masks

    def add(self, sample: CocoSample, found: Detection) -> None:
        """Count one image."""
        self._has_masks &= found.has_masks
        self.found += coco_results(found, sample.number, self._categories, self._has_masks)

    def same(self, found: Detection, first: Detection) -> tuple[int, int]:
        """Objects scored 0.3 or more with a partner of their class and IoU 0.9 or more; and all."""
        ours, theirs = found.kept(SHOWN_SCORE), first.kept(SHOWN_SCORE)
        return 2 * _pairs(ours, theirs), len(ours) + len(theirs)

    @cached_property
    def boxes(self) -> AveragePrecision:
        """Box AP."""
        return average_precision(self._data, self.found, self._categories, "bbox")

    @cached_property
    def masks(self) -> AveragePrecision | None:
        """Mask AP; None where the detector or the data has no masks."""
        if not self._has_masks:
            return None
        return average_precision(self._data, self.found, self._categories, "segm")

    def truth(self) -> dict[str, Any]:
        """The number of objects, and what of the annotations is left out, or is odd."""
        objects, checked = self._data.truth["annotations"], self._data.checked
        return {
            "objects": len(objects),
            "crowds": sum(entry["iscrowd"] for entry in objects),
            "left_out": [vars(finding) for finding in checked.left_out],
            "noted": [vars(finding) for finding in checked.noted],
        }

    def summary(self) -> dict[str, Any]:
        """Box and mask scores, the latter null without masks; and how many objects were found."""
        return {
            "box": self.boxes.as_dict(),
            "mask": self.masks and self.masks.as_dict(),
            "objects": len(self.found),
        }

    def by_class(self) -> list[dict[str, Any]]:
        """Box AP and, with masks, mask AP."""
        kinds = {"box_ap": self.boxes, "mask_ap": self.masks}
        scores = {kind: score.classes for kind, score in kinds.items() if score}
        rows = zip(*scores.values(), strict=True)
        return [dict(zip(scores, map(defined, row), strict=True)) for row in rows]


def coco_results(
    found: Detection, image: int, categories: Sequence[int], masks: bool
) -> list[dict[str, Any]]:
    """Objects found in an image, as COCO's result files have them; with ``masks`` or without."""
    parts = found.labels.tolist(), _sides(found), found.scores.tolist()
    rows: list[dict[str, Any]] = [
        {"image_id": image, "category_id": categories[label], "bbox": box, "score": score}
        for label, box, score in zip(*parts, strict=True)
    ]
    if masks:
        rows = [{**row, "segmentation": rle} for row, rle in zip(rows, found.rle(), strict=True)]
    return rows


def _sides(found: Detection) -> list[list[float]]:
    """Boxes as COCO has them: [x, y, width, height]."""
    boxes = found.boxes
    sides: list[list[float]] = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
    return sides


def _pairs(ours: Detection, theirs: Detection) -> int:
    """How many objects of one have a partner in the other, each in one pair at most."""
    if not len(ours) or not len(theirs):
        return 0
    from pycocotools import mask

    overlap = mask.iou(_sides(ours), _sides(theirs), [0] * len(theirs))
    overlap[ours.labels[:, None] != theirs.labels] = 0
    pairs = 0
    while overlap.max() >= _SAME:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        pairs += 1
    return pairs


def average_precision(
    data: CocoSet, found: Sequence[dict[str, Any]], categories: Sequence[int], kind: Kind
) -> AveragePrecision:
    """Score objects found against those annotated.

    Of an annotation of which a box or a mask was left out, its place is a crowd in that score:
    what is found there is neither right nor wrong.

    Args:
        data: what was annotated.
        found: as `coco_results` gives it. Of a mask the area is the mask's.
        categories: the ids that count, in the order of ``classes``.
        kind: box or mask AP.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        field = "bbox" if kind == "bbox" else "segmentation"
        ignored = data.checked.ignored[field]
        truth = COCO()
        # Copies, since pycocotools leaves marks on them.
        objects = [
            {**entry, "iscrowd": int(entry["id"] in ignored) or entry["iscrowd"]}
            for entry in data.truth["annotations"]
        ]
        truth.dataset = {**data.truth, "annotations": objects}
        truth.createIndex()
        rows = [
            {key: entry[key] for key in ("image_id", "category_id", "score", field)}
            for entry in found
        ]
        if rows:
            answers = truth.loadRes(rows)
        else:  # which it cannot take
            answers = COCO()
            answers.dataset = {**data.truth, "annotations": []}
            answers.createIndex()
        evaluator = COCOeval(truth, answers, kind)
        evaluator.params.catIds = list(categories)
        evaluator.params.imgIds = [entry["id"] for entry in data.truth["images"]]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    # (thresholds, recalls, classes), of objects of any size, at most 100 an image.
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    order = [evaluator.params.catIds.index(category) for category in categories]
    # As `summarize` orders them; -1 is not defined.
    stats = [math.nan if value == -1 else float(value) for value in evaluator.stats]
    by_class = tuple(_mean(precision[:, :, place]) for place in order)
    ap, ap50, ap75, small, medium, large = stats[:6]
    return AveragePrecision(ap, ap50, ap75, small, medium, large, stats[8], by_class)


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan
