"""Panoptic quality on COCO's panoptic files: a JSON of segments, and PNGs of their pixels.

By the rule of COCO's code (``panopticapi.evaluation``): a found segment and a true one of its class
are a pair where they share more than half of their union, pixels without truth left out. PQ of a
class is the pairs' IoU over pairs, false and missed segments, the latter two by half; a crowd is
not missed, and what lies mostly on a crowd of its class, or where there is no truth, not false.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ValidationError

from fdconv_deploy.evaluation.datasets import DatasetError
from fdconv_deploy.evaluation.metrics import Score, defined
from fdconv_deploy.runtime.images import read_image
from fdconv_deploy.runtime.panoptic import PanopticSegmentation
from fdconv_deploy.runtime.segmentation import VOID

_OFFSET = 1 << 24  # beyond every segment of a PNG
_NAMES = ("pq", "sq", "rq")
Ids = NDArray[np.integer]


class _Image(BaseModel):
    id: int | str
    file_name: str


class _SegmentInfo(BaseModel):
    id: int
    category_id: int
    iscrowd: int = 0


class _Annotation(BaseModel):
    image_id: int | str
    file_name: str
    segments_info: list[_SegmentInfo]


class _Category(BaseModel):
    id: int
    name: str
    isthing: int


class _PanopticFile(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass(frozen=True)
class TrueSegment:
    """A segment of the truth: its value in ``ids``, its class, and whether it is a crowd."""

    id: int
    label: int
    is_crowd: bool


@dataclass(frozen=True)
class PanopticSample:
    """``image`` (H, W, 3) uint8 RGB; ``ids`` (H, W) int64 segments, 0 where there is no truth."""

    image: NDArray[np.uint8]
    ids: Ids
    segments: tuple[TrueSegment, ...]


class PanopticSet:
    """Images with their true segments, read one after the other.

    ``annotations`` is COCO's panoptic JSON, of which the first ``limit`` count, ``segments`` the
    folder of its PNGs. All the network's ``classes`` but "void" are among its categories.

    Raises:
        DatasetError: the file is no such JSON, or lacks a class.
    """

    notes: Sequence[str] = ()
    first: Path  # the first image's file

    def __init__(
        self,
        annotations: Path,
        segments: Path,
        images: Path,
        classes: Sequence[str],
        limit: int | None = None,
    ) -> None:
        try:
            found = _PanopticFile.model_validate_json(annotations.read_bytes())
        except OSError as error:
            raise DatasetError(f"{annotations} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise DatasetError(
                f"{annotations} is no panoptic file of COCO's form: {where}: {first['msg']}. "
                "Expected images, annotations with segments_info, and categories with isthing."
            ) from None
        classes = [name for name in classes if name != VOID]
        known = {category.name: category for category in found.categories}
        missing = [name for name in classes if name not in known]
        if missing:
            raise DatasetError(
                f"{annotations} has no category {missing[0]!r}, which the network finds "
                f"({len(missing)} of its {len(classes)} classes are missing). Its categories are "
                f"{', '.join(list(known)[:5])}, …"
            )
        self._things = tuple(bool(known[name].isthing) for name in classes)
        labels = {known[name].id: label for label, name in enumerate(classes)}
        categories = {category.id for category in found.categories}
        names = {image.id: image.file_name for image in found.images}
        self._files: list[tuple[Path, Path, set[int], tuple[TrueSegment, ...]]] = []
        for annotation in found.annotations[:limit]:
            if annotation.image_id not in names:
                raise DatasetError(f"image {annotation.image_id!r} is annotated, and not listed.")
            infos = annotation.segments_info
            unknown = [info.category_id for info in infos if info.category_id not in categories]
            if unknown:
                raise DatasetError(
                    f"{annotations} has no category {unknown[0]}, of which {annotation.file_name} "
                    "has a segment. Expected an entry in its categories for each."
                )
            truth = tuple(
                TrueSegment(info.id, labels[info.category_id], bool(info.iscrowd))
                for info in infos
                if info.category_id in labels
            )
            image, png = images / names[annotation.image_id], segments / annotation.file_name
            self._files.append((image, png, {info.id for info in infos}, truth))
        if not self._files:
            raise DatasetError(f"{annotations} holds no annotation.")
        self.first = self._files[0][0]

    def score(self, _: Sequence[str]) -> PanopticScore:
        """What counts a network's answers."""
        return PanopticScore(self._things)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[PanopticSample]:
        for file, path, expected, segments in self._files:
            image = read_image(file)
            try:
                with Image.open(path) as png:
                    colours = np.asarray(png.convert("RGB")).astype(np.int64)
            except OSError as error:
                raise DatasetError(f"the segments {path} cannot be read: {error}.") from None
            if colours.shape[:2] != image.shape[:2]:
                raise DatasetError(
                    f"{path} is of {colours.shape[:2]} pixels (height, width), its image of "
                    f"{image.shape[:2]}."
                )
            ids = colours @ np.array([1, 256, 65536])
            if absent := expected - set(np.unique(ids).tolist()):
                raise DatasetError(
                    f"{path} has no pixel of segment {min(absent)}, which its segments_info names "
                    f"({len(absent)} such). Expected red + 256 green + 65536 blue to be the ids "
                    "of its segments: are the JSON and the PNGs of one set?"
                )
            yield PanopticSample(image, ids, segments)


class PanopticScore(Score[PanopticSample, PanopticSegmentation]):
    """Pairs, false and missed segments of each class, over any number of images."""

    measure = "PQ"

    def __init__(self, things: Sequence[bool]) -> None:
        self._things = np.array(things)  # of each class, whether its segments are objects
        self._iou = np.zeros(len(things))  # the sum over pairs
        self._pairs, self._false, self._missed = np.zeros((3, len(things)), np.int64)

    def add(self, sample: PanopticSample, found: PanopticSegmentation) -> None:
        """Count one image."""
        labels = {one.id: one.label for one in found.segments}
        self.count(sample.ids, sample.segments, found.ids, labels)

    def count(
        self, truth: Ids, segments: Iterable[TrueSegment], found: Ids, labels: dict[int, int]
    ) -> None:
        """Count the segments (H, W) of an image, 0 for none; ``labels`` are of those found."""
        true = {segment.id: segment for segment in segments}
        both, counts = np.unique(
            truth.astype(np.int64).ravel() * _OFFSET + found.ravel(), return_counts=True
        )
        shared = {divmod(int(b), _OFFSET): int(n) for b, n in zip(both, counts, strict=True)}
        areas, true_areas = Counter[int](), Counter[int]()
        for (one, other), count in shared.items():
            true_areas[one] += count
            areas[other] += count
        matched_true, matched = set(), set()
        for (one, other), count in shared.items():
            segment = true.get(one)
            if segment is None or segment.is_crowd or segment.label != labels.get(other):
                continue
            union = true_areas[one] + areas[other] - count - shared.get((0, other), 0)
            if 2 * count > union:
                self._pairs[segment.label] += 1
                self._iou[segment.label] += count / union
                matched_true.add(one)
                matched.add(other)
        crowds = {segment.label: one for one, segment in true.items() if segment.is_crowd}
        for one, segment in true.items():
            if one not in matched_true and not segment.is_crowd:
                self._missed[segment.label] += 1
        for other, label in labels.items():
            if other in matched or other not in areas:
                continue
            excused = shared.get((0, other), 0) + shared.get((crowds.get(label, -1), other), 0)
            if 2 * excused <= areas[other]:
                self._false[label] += 1

    def summary(self) -> dict[str, Any]:
        """PQ, SQ and RQ of all classes, of things and of stuff: means over those that count."""
        found = self._qualities()
        seen = ~np.isnan(found[:, 0])
        every = np.ones_like(self._things)
        scores = {}
        for kind, chosen in (("all", every), ("things", self._things), ("stuff", ~self._things)):
            which = seen & chosen
            means = found[which].mean(0).tolist() if which.any() else (None,) * 3
            scores[kind] = {**dict(zip(_NAMES, means, strict=True)), "classes": int(which.sum())}
        return {"panoptic": scores}

    def by_class(self) -> list[dict[str, Any]]:
        """PQ, SQ and RQ; all null of the last, which is of what is in no segment."""
        rows = [*self._qualities().tolist(), (np.nan,) * 3]
        return [dict(zip(_NAMES, map(defined, row), strict=True)) for row in rows]

    def _qualities(self) -> NDArray[np.float64]:
        """PQ, SQ and RQ of each class, (classes, 3); NaN of what is not true and was not found."""
        segments = self._pairs + (self._false + self._missed) / 2
        segments[segments == 0] = np.nan
        sq = np.where(segments > 0, self._iou / np.maximum(self._pairs, 1), np.nan)
        return np.stack([self._iou / segments, sq, self._pairs / segments], axis=1)
