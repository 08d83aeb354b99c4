"""Every annotation of a COCO file, checked before the first image is run.

What COCO's own code takes counts as it counts there. What it cannot take is named and left out
of both sides of a score: it is no object to be found, and what is found in its place is no
mistake. COCO's code has one means for the latter, a crowd: a region in which answers are ignored.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.coco_rle import Rle, area
from fdconv_deploy.evaluation.coco_masks import NotAMaskError, box_mask, coco_mask, mask_box

Part: TypeAlias = Literal["object", "box", "mask"]
T = TypeVar("T")

_ARTICLES = {"image": "an", "category": "a"}
_NEVER_FOUND = "COCO's code counts it as an object that nothing finds"


@dataclass(frozen=True)
class Image:
    """An image that annotations name: pycocotools' id of it, its file name, its size in pixels."""

    number: int
    name: str
    height: int
    width: int


@dataclass(frozen=True)
class Finding:
    """Something about an annotation that its user should know.

    Attributes:
        annotation: its id; its place in the list where it has none.
        image: its image's file name; None where that is not known.
        part: what of it is concerned.
        problem: a phrase that findings are counted by.
        found: what stands there, shortened.
        remark: what was expected, or what is done about it, as a phrase.
    """

    annotation: str
    image: str | None
    part: Part
    problem: str
    found: str
    remark: str

    def __str__(self) -> str:
        where = f" ({self.image})" if self.image is not None else ""
        part = "" if self.part == "object" else f" the {self.part} is"
        says = f"{part} {self.problem}: {self.found}; {self.remark}."
        return f"Annotation {self.annotation}{where}:{says}"


@dataclass
class Annotations:
    """The objects of a file, for pycocotools.

    Attributes:
        objects: annotations with ``id`` (from 1: to pycocotools an object of number 0 is none),
            ``image_id`` and ``category_id`` (pycocotools' ones), ``bbox`` in floats, ``area``,
            ``iscrowd`` and, where there are masks, ``segmentation`` in run lengths.
        ignored: "bbox" or "segmentation" -> the ids of those of which it is a region to ignore.
        left_out: what does not count.
        noted: what counts, and is odd.
    """

    objects: list[dict[str, Any]] = field(default_factory=list)
    ignored: dict[str, set[int]] = field(
        default_factory=lambda: {"bbox": set(), "segmentation": set()}
    )
    left_out: list[Finding] = field(default_factory=list)
    noted: list[Finding] = field(default_factory=list)

    @property
    def has_masks(self) -> bool:
        """Whether an object has a mask that counts."""
        return any(
            "segmentation" in entry and entry["id"] not in self.ignored["segmentation"]
            for entry in self.objects
        )


def read_annotations(
    told: list[Any], images: Mapping[Any, Image | None], categories: Mapping[Any, int]
) -> Annotations:
    """Check a file's annotations.

    Args:
        told: the file's list.
        images: by their ids in the file; None for those that are not taken.
        categories: pycocotools' ids by the file's.
    """
    # A file of boxes alone has nothing in place of masks, or an empty list.
    masks = any(isinstance(entry, dict) and entry.get("segmentation") for entry in told)
    made = Annotations()
    seen = Counter(_name(entry, place) for place, entry in enumerate(told))
    for place, entry in enumerate(told):
        _Annotation(made, entry, _name(entry, place)).read(images, categories, masks)
    for name, count in seen.items():
        if count > 1:
            made.noted.append(
                Finding(
                    name, None, "object", "an id of several annotations", f"{count} have it",
                    "each counts as itself, where COCO's code counts the last one for all",
                )
            )  # fmt: skip
    return made


def counted(findings: Iterable[Finding]) -> list[str]:
    """How often what was found, such as "3 masks (a polygon of two points)", most often first."""
    plurals = {"object": "objects", "box": "boxes", "mask": "masks"}
    counts = Counter((one.part, one.problem) for one in findings)
    return [
        f"{count} {part if count == 1 else plurals[part]} ({problem})"
        for (part, problem), count in counts.most_common()
    ]


class _Unfit(ValueError):  # noqa: N818 - caught here
    def __init__(self, problem: str, found: Any, expected: str) -> None:
        super().__init__(problem)
        self.finding = problem, found if isinstance(found, str) else _short(found), expected


class _Annotation:
    """One annotation on its way into ``made``."""

    def __init__(self, made: Annotations, entry: Any, name: str) -> None:
        self.made, self.entry, self.name = made, entry, name
        self.image: Image | None = None

    def read(
        self, images: Mapping[Any, Image | None], categories: Mapping[Any, int], masks: bool
    ) -> None:
        entry = self.entry
        try:
            if not isinstance(entry, dict):
                raise _Unfit("no annotation", entry, "expected {'image_id': …, 'bbox': …, …}")
            self.image = image = _listed(entry, "image_id", images, "image")
            if image is None:
                return
            category = _listed(entry, "category_id", categories, "category")
            crowd = _crowd(entry)
        except _Unfit as error:
            self._leave("object", error)
            return
        box = self._part("box", lambda: _box(entry))
        mask = self._part("mask", lambda: _mask(entry, image)) if masks else None
        if box is None and mask is None:
            return
        number = len(self.made.objects) + 1
        made: dict[str, Any] = {
            "id": number,
            "image_id": image.number,
            "category_id": category,
            "iscrowd": crowd,
            "area": self._area(box, mask),
        }
        if mask is not None:
            made["segmentation"] = mask
            self._note_mask(mask, image)
        elif masks:
            assert box is not None
            made["segmentation"] = box_mask(box, image.height, image.width)
            self.made.ignored["segmentation"].add(number)
        if box is not None:
            made["bbox"] = box.tolist()
            if not (box[2:] > 0).all():
                self._note("box", "without an area", entry["bbox"], _NEVER_FOUND)
        else:
            assert mask is not None
            made["bbox"] = mask_box(mask)
            self.made.ignored["bbox"].add(number)
        self.made.objects.append(made)

    def _part(self, part: Part, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except _Unfit as error:
            self._leave(part, error)
            return None

    def _area(self, box: NDArray[np.float64] | None, mask: Rle | None) -> float:
        """As it stands there; the format's own definition where it does not."""
        told = self.entry.get("area")
        if isinstance(told, int | float) and math.isfinite(told):
            return told
        found = f"area {_short(told)}"
        if mask is not None:
            self._note("object", "without an area in the file", found, "its mask's is taken")
            return area(mask)
        assert box is not None
        self._note("object", "without an area in the file", found, "its box's is taken")
        return float(box[2] * box[3])

    def _note_mask(self, mask: Rle, image: Image) -> None:
        (height, width), right = mask["size"], [image.height, image.width]
        if [height, width] != right:
            found = f"{height}x{width} (height x width) for {image.height}x{image.width}"
            self._note("mask", "of another size than its image", found, _NEVER_FOUND)
        elif area(mask) == 0:
            self._note("mask", "without a pixel", self.entry["segmentation"], _NEVER_FOUND)

    def _note(self, part: Part, problem: str, found: Any, remark: str) -> None:
        self._add(self.made.noted, part, problem, found, remark)

    def _leave(self, part: Part, error: _Unfit) -> None:
        self._add(self.made.left_out, part, *error.finding)

    def _add(
        self, findings: list[Finding], part: Part, problem: str, found: Any, remark: str
    ) -> None:
        image = None if self.image is None else self.image.name
        found = found if isinstance(found, str) else _short(found)
        findings.append(Finding(self.name, image, part, problem, found, remark))


def _listed(entry: dict[str, Any], key: str, known: Mapping[Any, T], what: str) -> T:
    number = entry.get(key)
    try:
        return known[number]
    except (KeyError, TypeError):  # TypeError: a list or an object is no key
        pass
    if number is None:
        raise _Unfit(f"of no {what}", f"{key} {_short(number)}", f"expected a listed {what}'s id")
    twin = _other_type(number)
    hint = f": {_short(twin)} is, so write it as there" if twin in known else ""
    raise _Unfit(
        f"of {_ARTICLES[what]} {what} that is not listed",
        f"{key} {_short(number)}",
        f"expected the id of a listed {what}{hint}",
    )


def _other_type(number: Any) -> Any:
    """An id as text if it is a number, as a number if it is text."""
    if isinstance(number, int):
        return str(number)
    decimal = isinstance(number, str) and number.isdecimal() and len(number) < 20
    return int(number) if decimal else None


def _crowd(entry: dict[str, Any]) -> int:
    """What pycocotools makes of it; a file that says nothing of crowds has none."""
    told = entry.get("iscrowd", 0)
    if not isinstance(told, int | float) or not math.isfinite(told):
        raise _Unfit("of unknown iscrowd", f"iscrowd {_short(told)}", "expected 0 or 1")
    return int(bool(told))


def _box(entry: dict[str, Any]) -> NDArray[np.float64]:
    told, expected = entry.get("bbox"), "expected [x, y, width, height], four finite numbers"
    if told is None:
        raise _Unfit("missing", "no bbox", expected)
    try:
        box = np.array(told, np.float64) if isinstance(told, list) else np.empty(0)
    except (ValueError, TypeError, OverflowError):
        raise _Unfit("not of numbers", told, expected) from None
    if box.shape != (4,):
        raise _Unfit("not of four numbers", told, expected)
    if not np.isfinite(box).all():
        raise _Unfit("not finite", told, expected)
    return box


def _mask(entry: dict[str, Any], image: Image) -> Rle:
    told = entry.get("segmentation")
    try:
        return coco_mask(told, image.height, image.width)
    except NotAMaskError as error:
        raise _Unfit(str(error), told, f"expected {error.expected}") from None


def _name(entry: Any, place: int) -> str:
    number = entry.get("id") if isinstance(entry, dict) else None
    return f"number {place} of the list" if number is None else _short(number)


def _short(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)
