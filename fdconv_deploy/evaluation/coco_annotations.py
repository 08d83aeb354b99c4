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
    """Something that pycocotools cannot take; for the arguments, all phrases, see `Finding`."""

    def __init__(self, problem: str, expected: str, found: str | None = None) -> None:
        super().__init__(problem)
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Finding:
    """Something about an annotation that its user should know."""

    annotation: str  # its id; its place in the list where it has none
    image: str | None  # its image's file name; None where that is not known
    part: Part  # what of it is concerned
    problem: str  # a phrase that findings are counted by
    found: str  # what stands there, shortened
    remark: str  # what was expected, or what is done about it, as a phrase

    def __str__(self) -> str:
        where = f" ({self.image})" if self.image is not None else ""
        part = "" if self.part == "object" else f" the {self.part} is"
        says = f"{part} {self.problem}: {self.found}; {self.remark}."
        return f"Annotation {self.annotation}{where}:{says}"


@dataclass
class Annotations:
    """The objects of a file, for pycocotools."""

    # Annotations with "id" (from 1: to pycocotools an object of number 0 is none), "image_id" and
    # "category_id" (pycocotools' ones), "bbox" in floats, "area", "iscrowd" and, where there are
    # masks, "segmentation" in run lengths.
    objects: list[dict[str, Any]] = field(default_factory=list)
    # The ids of those whose "bbox" or "segmentation" is a region to ignore.
    ignored: dict[str, set[int]] = field(
        default_factory=lambda: {"bbox": set(), "segmentation": set()}
    )
    left_out: list[Finding] = field(default_factory=list)  # what does not count
    noted: list[Finding] = field(default_factory=list)  # what counts, and is odd

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

    ``images`` and ``categories`` are pycocotools' ones by their ids in the file, None those of
    images that are not taken.
    """
    # A file of boxes alone has nothing in place of masks, or an empty list.
    masks = any(isinstance(entry, dict) and entry.get("segmentation") for entry in given)
    made = Annotations()
    names = [_name(entry, place) for place, entry in enumerate(given)]
    for entry, name in zip(given, names, strict=True):
        _read(made, entry, name, images, categories, masks)
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


def _read(
    made: Annotations,
    entry: Any,
    name: str,
    images: Mapping[Any, dict[str, Any] | None],
    categories: Mapping[Any, dict[str, Any]],
    masks: bool,
) -> None:
    """Add one annotation of a file, and what there is to say of it."""
    file: str | None = None

    def part_of(part: Part, given: Any, read: Callable[[Any], T]) -> T | None:
        try:
            return read(given)
        except UnfitError as error:
            found, remark = error.found or _short(given), f"expected {error.expected}"
            made.left_out.append(Finding(name, file, part, str(error), found, remark))
            return None

    def note(part: Part, problem: str, found: str, remark: str = _NEVER_FOUND) -> None:
        made.noted.append(Finding(name, file, part, problem, found, remark))

    image = part_of("object", entry, lambda given: _listed(given, "image_id", images, "an image"))
    if image is None:  # or one that is not taken
        return
    file, size = image["file_name"], (image["height"], image["width"])
    category = part_of("object", entry, lambda given: _category(given, categories))
    if category is None:
        return
    box = part_of("box", entry.get("bbox"), _box)
    drawn = entry.get("segmentation")
    mask = part_of("mask", drawn, lambda given: coco_mask(given, *size)) if masks else None
    number = len(made.objects) + 1
    if mask is not None:
        kind, own_area = "mask", float(area(mask))
        if (own := tuple(mask["size"])) != size:
            found = f"{own[0]}x{own[1]} (height x width) for {size[0]}x{size[1]}"
            note("mask", "of another size than its image", found)
        elif own_area == 0:
            note("mask", "without a pixel", _short(drawn))
    elif box is not None:
        kind, own_area = "box", float(box[2] * box[3])
        if masks:
            mask = box_mask(box, *size)
            made.ignored["segmentation"].add(number)
    else:
        return
    if box is None:
        assert mask is not None
        sides = mask_box(mask)
        made.ignored["bbox"].add(number)
    else:
        sides = box.tolist()
        if not (box[2:] > 0).all():
            note("box", "without an area", _short(entry["bbox"]))
    told = entry.get("area")
    if not isinstance(told, int | float) or not math.isfinite(told):
        remark = f"its {kind}'s is taken"
        note("object", "without an area in the file", f"area {_short(told)}", remark)
        told = own_area  # the format's own definition
    place = {"id": number, "image_id": image["id"], **category, "area": told, "bbox": sides}
    made.objects.append({**place, "segmentation": mask} if mask is not None else place)


def _listed(entry: Any, key: str, known: Mapping[Any, T], what: str) -> T:
    if not isinstance(entry, dict):
        raise UnfitError("no annotation", "{'image_id': …, 'bbox': …, …}", _short(entry))
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


def _category(entry: dict[str, Any], known: Mapping[Any, dict[str, Any]]) -> dict[str, int]:
    """Its category, and whether it is a crowd; a file that says nothing of crowds has none."""
    category, given = _listed(entry, "category_id", known, "a category"), entry.get("iscrowd", 0)
    if not isinstance(given, int | float) or not math.isfinite(given):
        raise UnfitError("of unknown iscrowd", "0 or 1", f"iscrowd {_short(given)}")
    return {"category_id": category["id"], "iscrowd": int(bool(given))}


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
    """The mask that an annotation's ``segmentation`` stands for, as it stands in the JSON.

    Polygons are drawn in the image's size; run lengths, compressed or not, have one of their own.

    Raises:
        UnfitError: pycocotools cannot take it, or would not come back from it.
    """
    if isinstance(segmentation, dict):
        return _run_lengths(segmentation)
    if not isinstance(segmentation, list):
        kind = {type(None): "null", str: "text"}.get(type(segmentation), "a number")
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

    corners = np.clip(np.sort([box[:2], box[:2] + box[2:]], axis=0), 0, [width, height])
    within = np.concatenate([corners[0], corners[1] - corners[0]])
    return _text(mask.frPyObjects(within[None], height, width)[0])


def mask_box(rle: Rle) -> list[float]:
    """The box [x, y, width, height] a pixel away from a mask on all sides; all 0 around none."""
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
        if problem := _polygon_problem(polygon):
            raise UnfitError(f"a polygon {problem}", POLYGONS)


def _polygon_problem(polygon: Any) -> str | None:
    try:
        values = np.array(polygon, np.float64)
    except (ValueError, TypeError, OverflowError):
        return "that is not a list of numbers"
    if values.ndim != 1:
        return "nested deeper than a list of numbers"
    if not np.isfinite(values).all():
        return "with coordinates that are not finite"
    farthest = np.abs(values).max(initial=0)
    if farthest * _STEPS >= 1 << 30:
        return "millions of pixels away"
    if farthest * _STEPS * len(values) > _MOST_STEPS:  # seldom, and then it is worth a sum
        points = values[: len(values) // 2 * 2].reshape(-1, 2)
        if _STEPS * np.abs(points - np.roll(points, 1, 0)).max(1).sum() > _MOST_STEPS:
            return "millions of pixels long"
    return None


def _text(made: dict[str, Any]) -> Rle:
    return {"size": list(map(int, made["size"])), "counts": made["counts"].decode("ascii")}
