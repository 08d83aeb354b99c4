"""Every annotation of a COCO file, checked before the first image is run.

What COCO's own code takes counts as it counts there. What it cannot take is named and left out
of both sides of a score: it is no object to be found, and what is found in its place is no
mistake. COCO's code has one means for the latter, a crowd: a region in which answers are ignored.

Segmentations become run lengths, as ``pycocotools`` makes them. It is C below, which trusts its
input: run lengths that do not add up to their size keep its overlap from ever ending, and a
coordinate that is no number makes it ask for gigabytes. So only what it can take is given to it.
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

from fdconv_deploy.coco_rle import MAX_MASK_PIXELS, Rle, area, compress, decompress

Part: TypeAlias = Literal["object", "box", "mask"]
T = TypeVar("T")

# pycocotools walks along a polygon in fifths of a pixel and holds every step, 16 bytes of it.
_STEPS = 5
_MOST_STEPS = 1 << 24

POLYGONS = "[[x1, y1, x2, y2, x3, y3, …], …], polygons of three points or more"
RUN_LENGTHS = "run lengths that add up to their size, {'size': [height, width], 'counts': …}"
_BOX = "[x, y, width, height], four finite numbers"
# How many findings are named in the terminal.
_NAMED, _ODD = 20, 5
_NEVER_FOUND = "COCO's code counts it as an object that nothing finds"


class UnfitError(ValueError):
    """Something that pycocotools cannot take.

    Args:
        problem: what it is, as a phrase that findings are counted by.
        expected: what was expected, as a phrase.
        found: what stands there, shortened; the whole box or segmentation if not given.
    """

    def __init__(self, problem: str, expected: str, found: str | None = None) -> None:
        super().__init__(problem)
        self.expected, self.found = expected, found


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

    def notes(self) -> list[str]:
        """The first of what is left out, and of what is odd, a line each."""
        lines = []
        for title, findings, most in (
            ("left out", self.left_out, _NAMED),
            ("counted, but odd", self.noted, _ODD),
        ):
            lines += [f"{title}: {finding}" for finding in findings[:most]]
            if len(findings) > most:
                lines.append(f"{title}: {len(findings) - most} more, which --json lists.")
        return lines

    def closing(self) -> str:
        """How much is left out, and how much is odd; empty where nothing is."""
        kinds = {"Left out": self.left_out, "Counted as COCO's code does it": self.noted}
        parts = [f"{kind}: {', '.join(counted(found))}" for kind, found in kinds.items() if found]
        return "; ".join(parts) + "." if parts else ""


def read_annotations(
    given: list[Any],
    images: Mapping[Any, dict[str, Any] | None],
    categories: Mapping[Any, dict[str, Any]],
) -> Annotations:
    """Check a file's annotations.

    Args:
        given: the file's list.
        images: pycocotools' ones by their ids in the file; None for those that are not taken.
        categories: pycocotools' ones by the file's ids.
    """
    # A file of boxes alone has nothing in place of masks, or an empty list.
    masks = any(isinstance(entry, dict) and entry.get("segmentation") for entry in given)
    made = Annotations()
    names = [_name(entry, place) for place, entry in enumerate(given)]
    for entry, name in zip(given, names, strict=True):
        _Annotation(made, entry, name).read(images, categories, masks)
    made.noted += [
        Finding(
            name, None, "object", "an id of several annotations", f"{count} have it",
            "each counts as itself, where COCO's code counts the last one for all",
        )
        for name, count in Counter(names).items()
        if count > 1
    ]  # fmt: skip
    return made


def counted(findings: Iterable[Finding]) -> list[str]:
    """How often what was found, such as "3 masks (a polygon of two points)", most often first."""
    plurals = {"object": "objects", "box": "boxes", "mask": "masks"}
    counts = Counter((one.part, one.problem) for one in findings)
    return [
        f"{count} {part if count == 1 else plurals[part]} ({problem})"
        for (part, problem), count in counts.most_common()
    ]


class _Annotation:
    """One annotation on its way into ``made``."""

    def __init__(self, made: Annotations, entry: Any, name: str) -> None:
        self.made, self.entry, self.name = made, entry, name
        self.image: str | None = None

    def read(
        self,
        images: Mapping[Any, dict[str, Any] | None],
        categories: Mapping[Any, dict[str, Any]],
        masks: bool,
    ) -> None:
        entry = self.entry
        try:
            if not isinstance(entry, dict):
                raise UnfitError("no annotation", "{'image_id': …, 'bbox': …, …}", _short(entry))
            image = _listed(entry, "image_id", images, "an image")
            if image is None:
                return
            self.image = image["file_name"]
            category = _listed(entry, "category_id", categories, "a category")
            crowd = _crowd(entry)
        except UnfitError as error:
            self._leave_out("object", error, entry)
            return
        size = image["height"], image["width"]
        box = self._part("box", "bbox", _box)
        mask = self._part("mask", "segmentation", lambda m: coco_mask(m, *size)) if masks else None
        if box is None and mask is None:
            return
        number, ignored = len(self.made.objects) + 1, self.made.ignored
        made: dict[str, Any] = {
            "id": number,
            "image_id": image["id"],
            "category_id": category["id"],
            "iscrowd": crowd,
            "area": self._area(box, mask),
        }
        if mask is not None:
            self._check_mask(mask, size)
        elif masks:
            assert box is not None
            mask = box_mask(box, *size)
            ignored["segmentation"].add(number)
        if mask is not None:
            made["segmentation"] = mask
        if box is None:
            assert mask is not None
            made["bbox"] = mask_box(mask)
            ignored["bbox"].add(number)
        else:
            made["bbox"] = box.tolist()
            if not (box[2:] > 0).all():
                self._note("box", "without an area", _short(entry["bbox"]), _NEVER_FOUND)
        self.made.objects.append(made)

    def _part(self, part: Part, key: str, read: Callable[[Any], T]) -> T | None:
        given = self.entry.get(key)
        try:
            return read(given)
        except UnfitError as error:
            self._leave_out(part, error, given)
            return None

    def _area(self, box: NDArray[np.float64] | None, mask: Rle | None) -> float:
        """As it stands there; the format's own definition where it does not."""
        given = self.entry.get("area")
        if isinstance(given, int | float) and math.isfinite(given):
            return given
        remark = f"its {'box' if mask is None else 'mask'}'s is taken"
        self._note("object", "without an area in the file", f"area {_short(given)}", remark)
        if mask is not None:
            return area(mask)
        assert box is not None
        return float(box[2] * box[3])

    def _check_mask(self, mask: Rle, size: tuple[int, int]) -> None:
        if (own := tuple(mask["size"])) != size:
            found = f"{own[0]}x{own[1]} (height x width) for {size[0]}x{size[1]}"
            self._note("mask", "of another size than its image", found, _NEVER_FOUND)
        elif area(mask) == 0:
            found = _short(self.entry["segmentation"])
            self._note("mask", "without a pixel", found, _NEVER_FOUND)

    def _note(self, part: Part, problem: str, found: str, remark: str) -> None:
        self.made.noted.append(Finding(self.name, self.image, part, problem, found, remark))

    def _leave_out(self, part: Part, error: UnfitError, given: Any) -> None:
        found, remark = error.found or _short(given), f"expected {error.expected}"
        self.made.left_out.append(Finding(self.name, self.image, part, str(error), found, remark))


def _listed(entry: dict[str, Any], key: str, known: Mapping[Any, T], what: str) -> T:
    number, noun = entry.get(key), what.partition(" ")[2]
    try:
        return known[number]
    except (KeyError, TypeError):  # TypeError: a list or an object is no key
        found = f"{key} {_short(number)}"
    if number is None:
        raise UnfitError(f"of no {noun}", f"a listed {noun}'s id", found)
    other: Any = None  # as text if it is a number, as a number if it is text
    if isinstance(number, int):
        other = str(number)
    elif isinstance(number, str) and number.isdecimal() and len(number) < 20:
        other = int(number)
    hint = f": {_short(other)} is, so write it as there" if other in known else ""
    raise UnfitError(f"of {what} that is not listed", f"the id of a listed {noun}{hint}", found)


def _crowd(entry: dict[str, Any]) -> int:
    """What pycocotools makes of it; a file that says nothing of crowds has none."""
    given = entry.get("iscrowd", 0)
    if not isinstance(given, int | float) or not math.isfinite(given):
        raise UnfitError("of unknown iscrowd", "0 or 1", f"iscrowd {_short(given)}")
    return int(bool(given))


def _box(given: Any) -> NDArray[np.float64]:
    if given is None:
        raise UnfitError("missing", _BOX, "no bbox")
    try:
        box = np.array(given, np.float64) if isinstance(given, list) else np.empty(0)
    except (ValueError, TypeError, OverflowError):
        raise UnfitError("not of numbers", _BOX) from None
    if box.shape != (4,):
        raise UnfitError("not of four numbers", _BOX)
    if not np.isfinite(box).all():
        raise UnfitError("not finite", _BOX)
    return box


def _name(entry: Any, place: int) -> str:
    number = entry.get("id") if isinstance(entry, dict) else None
    return f"number {place} of the list" if number is None else _short(number)


def _short(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)


def coco_mask(segmentation: Any, height: int, width: int) -> Rle:
    """The mask that an annotation's ``segmentation`` stands for.

    Args:
        segmentation: as it stands in the JSON: polygons, or run lengths, compressed or not.
        height: the image's, which polygons are drawn in. Run lengths have a size of their own.
        width: likewise.

    Raises:
        UnfitError: pycocotools cannot take it, or would not come back from it.
    """
    if isinstance(segmentation, dict):
        return _run_lengths(segmentation)
    if not isinstance(segmentation, list):
        kinds = {type(None): "null", str: "text"}
        kind = kinds.get(type(segmentation), "a number")
        raise UnfitError(f"it is {kind}", f"{POLYGONS}, or {RUN_LENGTHS}")
    if not segmentation:
        raise UnfitError("an empty list", POLYGONS)
    from pycocotools import mask

    if isinstance(segmentation[0], dict):
        parts = [_run_lengths(entry, listed=True) for entry in segmentation]
        if any(part["size"] != parts[0]["size"] for part in parts):
            raise UnfitError("a list of run lengths of several sizes", RUN_LENGTHS)
        return _text(mask.merge(parts))
    _check_polygons(segmentation)
    return _text(mask.merge(mask.frPyObjects(segmentation, height, width)))


def box_mask(box: NDArray[np.float64], height: int, width: int) -> Rle:
    """The mask of all pixels of a box [x, y, width, height] that lie within the image."""
    from pycocotools import mask

    low, high = box[:2], box[:2] + box[2:]
    inside = np.clip(np.stack([np.minimum(low, high), np.maximum(low, high)]), 0, [width, height])
    within = np.concatenate([inside[0], inside[1] - inside[0]])
    return _text(mask.frPyObjects(within[None], height, width)[0])


def mask_box(rle: Rle) -> list[float]:
    """The box [x, y, width, height] around a mask, a pixel away from it; all 0 around none.

    A pixel away, since boxes end between pixels, and masks do not.
    """
    from pycocotools import mask

    if not area(rle):
        return [0.0] * 4
    left, top, width, height = mask.toBbox(rle).tolist()
    return [left - 1, top - 1, width + 2, height + 2]


def _run_lengths(given: Any, *, listed: bool = False) -> Rle:
    """Run lengths; of a list of them, pycocotools takes uncompressed ones alone."""
    if not isinstance(given, dict):
        raise UnfitError("a list of run lengths and other things", RUN_LENGTHS)
    (height, width), counts = _size(given), given.get("counts")
    if not isinstance(counts, str):
        lengths = _counts(counts)
    elif listed:
        raise UnfitError("a list of compressed run lengths", RUN_LENGTHS)
    else:
        try:
            lengths = decompress(counts)
        except ValueError:
            raise UnfitError("run lengths of other characters than COCO's", RUN_LENGTHS) from None
    pixels = height * width
    if not len(lengths) or lengths.min() < 0 or lengths.max() > pixels or lengths.sum() != pixels:
        raise UnfitError("run lengths that do not add up to their size", RUN_LENGTHS)
    return {"size": [height, width], "counts": compress(lengths)}


def _size(given: dict[str, Any]) -> tuple[int, int]:
    size = given.get("size")
    if size is None:
        raise UnfitError("run lengths without a size", RUN_LENGTHS)
    pair = size[:2] if isinstance(size, list) else []
    # Fractions are cut off, as pycocotools does it; 20.0 is what pandas makes of 20.
    if len(pair) < 2 or not all(
        isinstance(length, int | float) and 1 <= length <= MAX_MASK_PIXELS for length in pair
    ):
        raise UnfitError("run lengths whose size is not [height, width]", RUN_LENGTHS)
    height, width = map(int, pair)
    if height * width > MAX_MASK_PIXELS:
        raise UnfitError("run lengths of more pixels than any image has", RUN_LENGTHS)
    return height, width


def _counts(given: Any) -> NDArray[np.int64]:
    if not isinstance(given, list):
        lack = "without counts" if given is None else "whose counts are neither text nor a list"
        raise UnfitError(f"run lengths {lack}", RUN_LENGTHS)
    try:
        with np.errstate(invalid="raise"):
            lengths = np.array(given, np.uint32)  # fractions are cut off, as pycocotools does it
    except (ValueError, TypeError, OverflowError, FloatingPointError):
        lengths = np.zeros((0, 0), np.uint32)
    if lengths.ndim != 1:
        raise UnfitError("run lengths whose counts are not numbers from 0 on", RUN_LENGTHS)
    return lengths.astype(np.int64)


def _check_polygons(given: list[Any]) -> None:
    first = given[0]
    if isinstance(first, int | float):
        raise UnfitError("one list of numbers, not a list of polygons", POLYGONS)
    # The first one alone decides how pycocotools reads all of them.
    if not isinstance(first, list) or len(first) < 4:
        raise UnfitError("a list whose first part is not a polygon", POLYGONS)
    if len(first) == 4:
        raise UnfitError("a polygon of two points", POLYGONS)
    for polygon in given:
        _check_polygon(polygon)


def _check_polygon(polygon: Any) -> None:
    try:
        values = np.array(polygon, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise UnfitError("a polygon that is not a list of numbers", POLYGONS) from None
    if values.ndim != 1:
        raise UnfitError("a polygon nested deeper than a list of numbers", POLYGONS)
    if not np.isfinite(values).all():
        raise UnfitError("a polygon with coordinates that are not finite", POLYGONS)
    farthest = np.abs(values).max(initial=0)
    if farthest * _STEPS >= 1 << 30:
        raise UnfitError("a polygon millions of pixels away", POLYGONS)
    if farthest * _STEPS * len(values) > _MOST_STEPS:  # seldom, and then it is worth a sum
        points = values[: len(values) // 2 * 2].reshape(-1, 2)
        if _STEPS * np.abs(points - np.roll(points, 1, 0)).max(1).sum() > _MOST_STEPS:
            raise UnfitError("a polygon millions of pixels long", POLYGONS)


def _text(made: dict[str, Any]) -> Rle:
    return {
        "size": [int(length) for length in made["size"]],
        "counts": made["counts"].decode("ascii"),
    }
