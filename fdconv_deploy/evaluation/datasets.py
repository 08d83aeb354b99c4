"""Folders of images and masks, laid out as ADE20K, Cityscapes or any other data set.

ADE20K: ``images/validation/NAME.jpg`` with ``annotations/validation/NAME.png``. Cityscapes:
``leftImg8bit/val/CITY/NAME_leftImg8bit.png`` with ``gtFine/val/CITY/NAME_gtFine_….png``.
Otherwise a mask has its image's name, or that name and ``_labels``, and lies in the same
subfolder of the masks' folder as the image of the images' folder.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.class_mapping import (
    CITYSCAPES,
    CITYSCAPES_LABEL_IDS,
    IGNORE_INDEX,
    UNCOUNTED,
    LabelRule,
    ade20k_names,
    class_order,
    read_label_map,
)
from fdconv_deploy.evaluation.metrics import Score, Scores, confusion_matrix, defined, scores
from fdconv_deploy.runtime import Segmentation
from fdconv_deploy.runtime.images import PICTURE_FORMATS, SUFFIXES, image_size, load_image
from fdconv_deploy.runtime.input_files import image_files

_CITY_IMAGE, _CITY_TRAIN, _CITY_IDS = (
    "_leftImg8bit", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
)  # fmt: skip
# Below a data set's folder: its validation images and their masks.
_LAYOUTS = {
    "ADE20K": ("images/validation", "annotations/validation"),
    "Cityscapes": ("leftImg8bit/val", "gtFine/val"),
}


# How many of the numbers that are no classes a message names.
_NAMED = 8


class DatasetError(FDConvError):
    """Images and masks do not belong together, or cannot be read as such."""


@dataclass(frozen=True)
class Pair:
    """An image file and its mask's."""

    image: Path
    mask: Path

    @property
    def city_ids(self) -> bool:
        """Whether the mask holds Cityscapes' own label ids, by both names."""
        return self.image.stem.endswith(_CITY_IMAGE) and self.mask.name.endswith(_CITY_IDS)


@dataclass(frozen=True)
class Sample:
    """An image (H, W, C), uint8 RGB mostly; ``truth`` (H, W) int64, classes or -1 for none."""

    name: str
    image: NDArray[Any]
    truth: NDArray[np.int64]


class SemanticScore(Score[Sample, Segmentation]):
    """A segmentor's IoU and accuracies."""

    measure = "IoU"

    def __init__(self, classes: Sequence[str], notes: Sequence[str] = ()) -> None:
        # Pixels by (true class, predicted class).
        self.confusion = np.zeros((len(classes), len(classes)), np.int64)
        self._notes = list(notes)

    def add(self, sample: Sample, found: Segmentation) -> None:
        """Count one image."""
        self.confusion += confusion_matrix(sample.truth, found.labels, len(self.confusion))

    @property
    def scores(self) -> Scores:
        """Of all images so far."""
        return scores(self.confusion)

    def truth(self) -> dict[str, Any]:
        """How labels are read, and the number of pixels that count; ``DatasetError`` if none."""
        if not (pixels := int(self.confusion.sum())):
            raise DatasetError("No pixel counts: the masks hold nothing but labels to ignore.")
        return {"notes": self._notes, "pixels": pixels}

    def summary(self) -> dict[str, Any]:
        """Means over classes and pixels."""
        found = vars(self.scores)
        return {name: found[name] for name in ("mean_iou", "pixel_accuracy", "mean_accuracy")}

    def by_class(self) -> list[dict[str, Any]]:
        """IoU, accuracy, and true pixels."""
        rows = zip(self.scores.iou, self.scores.accuracy, self.confusion.sum(1), strict=True)
        return [
            {"iou": defined(iou), "accuracy": defined(accuracy), "pixels": int(pixels)}
            for iou, accuracy, pixels in rows
        ]


@dataclass(frozen=True)
class Samples:
    """Labelled images, decoded and checked one after the other."""

    pairs: Sequence[Pair]
    rule: LabelRule  # what the masks' numbers stand for
    # Of the network that the images are decoded for.
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    notes: Sequence[str] = ()  # sentences on how the labels are read

    @property
    def first(self) -> Path:
        """The first image's file."""
        return self.pairs[0].image

    def score(self, classes: Sequence[str]) -> SemanticScore:
        """What counts the answers of a segmentor of these classes."""
        return SemanticScore(classes, self.notes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Sample]:
        """Each sample, decoded when its turn comes; it raises what `check` raises."""
        for pair in self.pairs:
            image, raw = load_image(pair.image, self.preprocessing), read_mask(pair.mask)
            _check_sizes(pair, raw.shape, image.shape[:2])
            try:
                truth = self.rule_of(pair).apply(raw)
            except ValueError as error:
                raise DatasetError(f"The mask {pair.mask} {error}") from None
            yield Sample(pair.image.name, image, truth)

    def rule_of(self, pair: Pair) -> LabelRule:
        """The rule for a pair's mask: a label map is of the file's numbers, whatever its name."""
        if pair.city_ids and self.rule.label_map is None:
            return replace(self.rule, label_map=CITYSCAPES_LABEL_IDS)
        return self.rule

    def check(
        self, progress: Callable[[int], None] = lambda _: None, *, of_two: bool = False
    ) -> bool:
        """Read every mask, and of images the size, before anything is run.

        ``progress`` is told the number of masks done after each.

        Returns:
            With ``of_two``, whether they are black and white, of the network's two classes: all
            hold 0 and 255 alone, not 0 alone.

        Raises:
            DatasetError: a mask cannot be read, or is not of its image's size; they hold numbers
                that are no class, which are named, or nothing that counts.
            ImageError: an image is missing, or none.
        """
        pixels, masks = Counter[tuple[int, bool]](), Counter[tuple[int, bool]]()
        first: dict[tuple[int, bool], Pair] = {}
        for done, pair in enumerate(self.pairs, 1):
            raw, how = read_mask(pair.mask), self.preprocessing
            in_colour = how.loading == "color"
            size = image_size(pair.image) if in_colour else load_image(pair.image, how).shape[:2]
            _check_sizes(pair, raw.shape, size)
            counts = np.bincount(raw.ravel())
            for number in np.flatnonzero(counts).tolist():
                key = number, pair.city_ids
                first.setdefault(key, pair)
                pixels[key] += int(counts[number])
                masks[key] += 1
            progress(done)
        held = {number for number, _ in first}
        if of_two and 255 in held and held <= {0, 255}:
            return True
        found = {key: self.rule_of(pair).class_of(key[0]) for key, pair in first.items()}
        if all(label == UNCOUNTED for label in found.values()):
            raise DatasetError(
                f"Of {len(self)} masks no pixel counts: they hold nothing but labels to ignore."
            )
        if wrong := sorted(key for key, label in found.items() if label is None):
            named = [
                f"{key[0]} ({pixels[key]:,} pixels in {masks[key]} of {len(self)} masks, such as "
                f"{first[key].mask})"
                for key in wrong[:_NAMED]
            ]
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            expected = self.rule_of(first[wrong[0]]).expected({number for number, _ in wrong})
            raise DatasetError(
                f"The masks hold numbers that are no classes: {', '.join(named)}{more}; {expected}"
            )
        return False


def labelled_samples(
    pairs: Sequence[Pair],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    *,
    data: Path | None = None,
    label_map: Path | None = None,
    reduce_zero_label: bool = False,
    ignore_index: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Samples:
    """Samples for a network, once every mask has been read.

    Its class names are compared with those that the data set's folder, ``data``, may hold. For
    ``label_map`` see `read_label_map`, for the rest `LabelRule` and `Samples.check`.

    Raises:
        DatasetError: masks cannot be read or scored.
        FDConvError: the label map cannot be read, or Cityscapes' label ids have no meaning here.
    """
    mapping = read_label_map(label_map, classes) if label_map else None
    order, notes = None, []
    if mapping is None:
        ids = any(pair.city_ids for pair in pairs)
        table = ("Cityscapes", CITYSCAPES) if ids else _class_names(data) if data else None
        try:
            order = class_order(classes, table[1], table[0]) if table else None
        except FDConvError as error:
            if ids:
                raise FDConvError(
                    f"{error} The masks hold Cityscapes' label ids: say by a --label-map what "
                    "they stand for."
                ) from None
            notes.append(f"{error} The masks' numbers are taken for the network's classes.")
        if table and order:
            notes.append(
                f"The network has {table[0]}'s classes in another order: they are matched by name."
            )
    ignore = IGNORE_INDEX if ignore_index is None else ignore_index
    rule = LabelRule(len(classes), mapping, reduce_zero_label, ignore, order)
    samples = Samples(pairs, rule, preprocessing, notes)
    as_they_are = mapping is None and ignore_index is None and not reduce_zero_label
    if samples.check(progress, of_two=as_they_are and len(classes) == 2):
        notes.append(
            "The masks hold 0 and 255 alone, black and white: they are taken for the classes "
            f"{classes[0]!r} and {classes[1]!r}. Say --ignore-index 255 if 255 is to be ignored."
        )
        return replace(samples, rule=replace(rule, label_map={0: 0, 255: 1}))
    return samples


def layout_of(root: Path) -> tuple[Path, Path]:
    """The folders of validation images and masks of a data set as it is unpacked."""
    for images, masks in _LAYOUTS.values():
        if (root / images).is_dir() and (root / masks).is_dir():
            return root / images, root / masks
    known = "; ".join(f"{name}: {images} and {masks}" for name, (images, masks) in _LAYOUTS.items())
    raise DatasetError(
        f"{root} has no folders of a known data set ({known}; COCO: annotations/instances_….json "
        "and its images). Give them with --images and --masks, or --annotations."
    )


def find_pairs(images: Path, masks: Path) -> list[Pair]:
    """Every image below a folder with its mask, sorted by path.

    Raises:
        DatasetError: a folder is missing or holds no images, or an image has no mask.
    """
    for folder, what in ((images, "images"), (masks, "masks")):
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise DatasetError(f"A folder of {what} was expected, but {folder} {found}.")
    pairs = []
    for path in image_files(images.rglob("*")):
        if path.name.startswith("."):  # macOS leaves ._NAME.jpg behind in archives
            continue
        where, base = masks / path.relative_to(images).parent, path.stem
        ends = (".png", "_labels.png")
        if base.endswith(_CITY_IMAGE):
            base, ends = base.removesuffix(_CITY_IMAGE), (_CITY_TRAIN, _CITY_IDS)
        likely = [one for end in ends if (one := where / f"{base}{end}") != path]
        mask = next(filter(Path.is_file, likely), None)
        if mask is None:
            raise DatasetError(
                f"The image {path} has no mask: expected {' or '.join(one.name for one in likely)} "
                f"in {where}. Add it, or remove the image."
            )
        pairs.append(Pair(path, mask))
    if not pairs:
        raise DatasetError(f"{images} holds no images ({', '.join(SUFFIXES)}).")
    return pairs


def _class_names(root: Path) -> tuple[str, Sequence[Sequence[str]]] | None:
    """A data set's name and all names of each of its classes, where its folder tells them."""
    if (root / _LAYOUTS["Cityscapes"][0]).is_dir():
        return "Cityscapes", CITYSCAPES
    table = ade20k_names(root)
    return None if table is None else ("ADE20K", table)


def _check_sizes(pair: Pair, mask: tuple[int, ...], image: tuple[int, ...]) -> None:
    if mask != image:
        found, expected = (f"{h}x{w}" for h, w in (mask, image))
        raise DatasetError(
            f"The mask {pair.mask} is {found} (height x width), its image {pair.image} "
            f"{expected}. Scores are taken at the image's own size: give masks of that size."
        )


def read_mask(path: Path) -> NDArray[np.int64]:
    """A mask's numbers, (H, W) int64: gray levels of 8 or 16 bits, or indices of a palette.

    Raises:
        DatasetError: it cannot be read, or has colours in place of numbers.
    """
    try:
        # From memory: of a file, Pillow reads as many bytes as a damaged length says there are.
        with Image.open(io.BytesIO(path.read_bytes()), formats=PICTURE_FORMATS) as opened:
            opened.load()
            mode, pixels = opened.mode, np.asarray(opened)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged files, as in read_image
        raise DatasetError(f"The mask {path} cannot be read: {error}.") from error
    if pixels.ndim != 2 or mode == "F":
        raise DatasetError(
            f"The mask {path} holds {mode} pixels. A mask holds one number a pixel: gray levels "
            "or palette indices. Convert its colours to class indices."
        )
    numbers = pixels.astype(np.int64)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < 1 << 16:
        raise DatasetError(
            f"The mask {path} holds numbers from {numbers.min()} to {numbers.max()}; expected "
            "16 bits, 0 to 65535."
        )
    return numbers
