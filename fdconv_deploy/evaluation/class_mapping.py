"""From the numbers in a mask to the classes of a network: label maps and class names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.errors import FDConvError

# What no class is: pixels that are not counted.
UNCOUNTED = -1
IGNORE_INDEX = 255

# Cityscapes' 19 evaluated classes, in the order of their train ids: label id and name.
_CITY_TRAINED = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_CITY_LABELS = range(34)

CITYSCAPES = tuple((name,) for name in _CITY_TRAINED.values())
"""The names of Cityscapes' classes, as `class_order` takes them."""

CITYSCAPES_LABEL_IDS = {
    **dict.fromkeys((*_CITY_LABELS, IGNORE_INDEX), UNCOUNTED),
    **{label: train for train, label in enumerate(_CITY_TRAINED)},
}
"""Cityscapes' label ids (``…_gtFine_labelIds.png``) to its 19 classes: a label map."""


@dataclass(frozen=True)
class LabelRule:
    """How a mask's numbers become classes, in this order."""

    classes: int  # how many the network has
    label_map: Mapping[int, int] | None = None  # a mask's number -> class; all of them, if given
    # 0 is not counted, and every other number stands for the class one below it (mmsegmentation's
    # option of this name; ADE20K needs it).
    reduce_zero_label: bool = False
    # A class that is not counted, which none is by default: mmsegmentation's ``ignore_index``. 255
    # stays 255 when numbers are reduced.
    ignore: int = IGNORE_INDEX
    # The network's class for each of the data set's, where they are ordered otherwise.
    order: tuple[int, ...] | None = None

    def class_of(self, number: int) -> int | None:
        """The class that a mask's number stands for, or `UNCOUNTED`; None if for no class."""
        if self.label_map is not None:
            if number not in self.label_map:
                return UNCOUNTED if number == self.ignore else None
            number = self.label_map[number]
        if self.reduce_zero_label and number != UNCOUNTED:
            # No class is as high: it was put there to be ignored.
            if number == 0 or (number == self.ignore and number > self.classes):
                return UNCOUNTED
            number -= 1
        if number in (self.ignore, UNCOUNTED):
            return UNCOUNTED
        if not 0 <= number < self.classes:
            return None
        return number if self.order is None else self.order[number]

    def apply(self, raw: NDArray[np.int64]) -> NDArray[np.int64]:
        """(H, W) int64 numbers -> (H, W) int64 classes, and `UNCOUNTED` where none counts.

        Raises:
            ValueError: a number stands for no class. The message goes on after "The mask PATH ".
        """
        lowest = int(raw.min())
        # As a table: masks have millions of pixels, and a few numbers.
        table = np.full(int(raw.max()) - lowest + 1, UNCOUNTED, np.int64)
        for offset in np.flatnonzero(np.bincount(raw.ravel() - lowest)):
            number = lowest + int(offset)
            found = self.class_of(number)
            if found is None:
                pixels = int((raw == number).sum())
                raise ValueError(
                    f"has {pixels} pixels of label {number}; {self.expected({number})}"
                )
            table[offset] = found
        return table[raw - lowest]

    def expected(self, wrong: Set[int]) -> str:
        """A sentence on what masks may hold, for those that hold ``wrong`` numbers."""
        if self.label_map is CITYSCAPES_LABEL_IDS:
            return (
                f"Cityscapes' label ids go from 0 to {_CITY_LABELS[-1]}. Give its masks as "
                "unpacked, or a --label-map."
            )
        if self.label_map is not None and not wrong <= set(self.label_map):
            return (
                "not every number is in the label map. Add it, with null if its pixels are not "
                "to be counted."
            )
        expected = (
            f"the network has classes 0 to {self.classes - 1}, and {self.ignore} stands for "
            "pixels that are not counted."
        )
        if self.label_map is None and not self.reduce_zero_label and wrong == {self.classes}:
            return (
                f"{expected} If 0 stands for none of the classes (ADE20K), say --reduce-zero-label."
            )
        return f"{expected} Give the masks of this network's data set, or a --label-map."


def class_order(
    classes: Sequence[str], table: Sequence[Sequence[str]], data_set: str
) -> tuple[int, ...] | None:
    """A network's class for each of a data set's, by name; None where they stand alike.

    Where a checkpoint gave no names, numbers ("class 0") say nothing against the data set's order.
    ``table`` has all the names that each of the data set's classes goes by.

    Raises:
        FDConvError: a class of one is none of the other's. The message says which.
    """
    unnamed = tuple(f"class {number}" for number in range(len(classes)))
    if tuple(classes) == unnamed and len(classes) == len(table):
        return None
    place = {_plain(name): index for index, name in enumerate(classes)}
    # By their first names, and by ADE20K's synonyms ("screen" is one of three) where those lack.
    found = [place.get(_plain(names[0])) for names in table]
    for index, names in enumerate(table):
        if found[index] is None:
            others = (place.get(_plain(name)) for name in names[1:])
            found[index] = next((n for n in others if n is not None and n not in found), None)
    lacking = [table[index][0] for index, where in enumerate(found) if where is None]
    extra = [name for index, name in enumerate(classes) if index not in found]
    differ = [f"only the network has {_listed(extra)}"] if extra else []
    differ += [f"only {data_set} has {_listed(lacking)}"] if lacking else []
    if differ:
        raise FDConvError(
            f"The network's classes are not those of {data_set}: {' and '.join(differ)}."
        )
    order = tuple(where for where in found if where is not None)
    return None if order == tuple(range(len(order))) else order


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - 5} more"] if len(names) > 5 else []
    return ", ".join([repr(name) for name in names[:5]] + more)


def ade20k_names(root: Path) -> list[list[str]] | None:
    """The names of ADE20K's classes out of its own table, ``objectInfo150.txt``.

    None where it lacks, or is not one: other data sets are laid out like this one.
    """
    file = root / "objectInfo150.txt"
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    rows = [line.split("\t") for line in lines]
    if not rows or rows[0][-1] != "Name":
        return None
    return [[name.strip() for name in row[-1].split(",")] for row in rows[1:]]


def read_label_map(path: Path, classes: Sequence[str]) -> dict[int, int]:
    """A JSON object of a mask's numbers and what they stand for; ``FDConvError`` if it is none.

    What: a class's number or name, or null for pixels that are not counted, such as
    ``{"0": null, "7": "road", "8": 1}``.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FDConvError(f"The label map {path} is not JSON: {error}.") from error
    if not isinstance(given, dict):
        raise FDConvError(f'The label map {path} is not a JSON object such as {{"7": "road"}}.')
    result = {}
    for key, value in given.items():
        wrong = None
        if not key.isdecimal() or len(key) > 9:
            wrong = f"{key[:40]!r} is not a number that masks hold"
        elif value is None:
            result[int(key)] = UNCOUNTED
        elif value in classes:
            result[int(key)] = classes.index(value)
        elif isinstance(value, str):
            wrong = f"the network has no class {value!r}; it has {', '.join(classes)}"
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            result[int(key)] = value
        else:
            wrong = f"label {key} stands for a class's number or name, or null, not {value!r}"
        if wrong is not None:
            raise FDConvError(f"The label map {path}: {wrong}.")
    return result
