"""From the numbers in a mask to the classes of a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.errors import FDConvError

# What no class is: pixels that are not counted.
UNCOUNTED = -1
IGNORE_INDEX = 255

# Cityscapes' 19 evaluated classes, in the order of their train ids, by their label ids.
_CITY_TRAINED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITY_LABELS = range(34)


@dataclass(frozen=True)
class LabelRule:
    """How a mask's numbers become classes, in this order.

    Attributes:
        classes: how many classes the network has.
        label_map: a mask's number -> class; when given, every number must be in it.
        reduce_zero_label: 0 is not counted, and every other number stands for the class one
            below it (mmsegmentation's option of this name; ADE20K needs it).
        ignore: a number that is not counted, in masks and in what the label map gives.
    """

    classes: int
    label_map: Mapping[int, int] | None = None
    reduce_zero_label: bool = False
    ignore: int = IGNORE_INDEX

    def apply(self, raw: NDArray[np.int64]) -> NDArray[np.int64]:
        """(H, W) int64 numbers -> (H, W) int64 classes, and `UNCOUNTED` where none counts.

        :raises ValueError: a number stands for no class. The message goes on after "The mask
            PATH ".
        """
        lowest = int(raw.min())
        # As a table: masks have millions of pixels, and a few numbers.
        table = np.full(int(raw.max()) - lowest + 1, UNCOUNTED, np.int64)
        for offset in np.flatnonzero(np.bincount(raw.ravel() - lowest)):
            number = lowest + int(offset)
            found = self._class_of(number)
            if not UNCOUNTED <= found < self.classes:
                raise ValueError(self._complaint(raw, number))
            table[offset] = found
        return table[raw - lowest]

    def _class_of(self, number: int) -> int:
        if number in (self.ignore, UNCOUNTED):
            return UNCOUNTED
        if self.label_map is not None:
            if number not in self.label_map:
                raise ValueError(
                    f"names label {number}, which the label map does not have. Add it, with null "
                    "if its pixels are not to be counted."
                )
            number = self.label_map[number]
            if number in (self.ignore, UNCOUNTED):
                return UNCOUNTED
        return number - 1 if self.reduce_zero_label else number

    def _complaint(self, raw: NDArray[np.int64], number: int) -> str:
        pixels = int((raw == number).sum())
        said = (
            f"has {pixels} pixels of label {number}; the network has classes 0 to "
            f"{self.classes - 1}, and {self.ignore} stands for pixels that are not counted."
        )
        if self.label_map is None and not self.reduce_zero_label and number == self.classes:
            return f"{said} If 0 stands for none of the classes (ADE20K), say --reduce-zero-label."
        return f"{said} Give the masks of this network's data set, or a --label-map."


def cityscapes_classes(raw: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cityscapes' label ids (``…_gtFine_labelIds.png``) -> its 19 classes, or `UNCOUNTED`.

    :raises ValueError: a number is no label id of Cityscapes; see `LabelRule.apply`.
    """
    known = (raw >= UNCOUNTED) & ((raw < len(_CITY_LABELS)) | (raw == IGNORE_INDEX))
    if not known.all():
        raise ValueError(
            f"names label {int(raw[~known].max())}, and Cityscapes' label ids go from 0 to "
            f"{_CITY_LABELS[-1]}. Give its masks as unpacked, or a --label-map."
        )
    table = np.full(IGNORE_INDEX + 1, UNCOUNTED, np.int64)
    table[list(_CITY_TRAINED)] = np.arange(len(_CITY_TRAINED))
    return table[raw]


def read_label_map(path: Path, classes: Sequence[str]) -> dict[int, int]:
    """A JSON object of a mask's numbers and what they stand for.

    What: a class's number or name, or null for pixels that are not counted, such as
    ``{"0": null, "7": "road", "8": 1}``.

    :param classes: the network's class names, in order.
    :raises FDConvError: the file is no such object.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FDConvError(f"The label map {path} is not JSON: {error}.") from error
    if not isinstance(told, dict):
        raise FDConvError(f'The label map {path} is not a JSON object such as {{"7": "road"}}.')
    result = {}
    for key, value in told.items():
        if not key.isdecimal():
            raise FDConvError(f"The label map {path}: {key!r} is not a number that masks hold.")
        if value is None:
            result[int(key)] = UNCOUNTED
        elif isinstance(value, str):
            if value not in classes:
                raise FDConvError(
                    f"The label map {path}: the network has no class {value!r}; it has "
                    f"{', '.join(classes)}."
                )
            result[int(key)] = classes.index(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            result[int(key)] = value
        else:
            raise FDConvError(
                f"The label map {path}: label {key} stands for a class's number or name, or "
                f"null, not {value!r}."
            )
    return result
