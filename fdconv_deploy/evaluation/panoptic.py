"""Panoptic quality on COCO's panoptic files: a JSON of segments, and PNGs of their pixels.

By the rule of COCO's code (``panopticapi.evaluation``): a found segment and a true one of its class
are a pair where they share more than half of their union, pixels without truth left out. PQ of a
class is the pairs' IoU over pairs, false and missed segments, the latter two by half; a crowd is
not missed, and what lies mostly on a crowd of its class, or where there is no truth, not false.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ValidationError

from fdconv_deploy.evaluation.datasets import DatasetError
from fdconv_deploy.runtime.images import read_image

_OFFSET = 1 << 24  # beyond every segment of a PNG
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

    Args:
        annotations: COCO's panoptic JSON.
        segments: the folder of its PNGs.
        images: the folder of its images.
        classes: names of the network's classes, all among the file's categories.
        limit: take the first annotations alone.

    Attributes:
        things: of each class, whether its segments are objects.

    Raises:
        DatasetError: the file is no such JSON, or lacks a class.
    """

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
        known = {category.name: category for category in found.categories}
        missing = [name for name in classes if name not in known]
        if missing:
            raise DatasetError(
                f"{annotations} has no category {missing[0]!r}, which the network finds "
                f"({len(missing)} of its {len(classes)} classes are missing). Its categories are "
                f"{', '.join(list(known)[:5])}, …"
            )
        self.things = tuple(bool(known[name].isthing) for name in classes)
        self._labels = {known[name].id: label for label, name in enumerate(classes)}
        self._names = {image.id: image.file_name for image in found.images}
        self._annotations = found.annotations[:limit]
        self._segments, self._images = segments, images
        categories = {category.id for category in found.categories}
        for annotation in self._annotations:
            for info in annotation.segments_info:
                if info.category_id not in categories:
                    raise DatasetError(
                        f"{annotations} has no category {info.category_id}, of which "
                        f"{annotation.file_name} has a segment. Expected an entry in its "
                        "categories for each."
                    )
        if not self._annotations:
            raise DatasetError(f"{annotations} holds no annotation.")

    def __len__(self) -> int:
        return len(self._annotations)

    def __iter__(self) -> Iterator[PanopticSample]:
        for annotation in self._annotations:
            if annotation.image_id not in self._names:
                raise DatasetError(f"image {annotation.image_id!r} is annotated, and not listed.")
            image = read_image(self.file_of(annotation.image_id))
            path = self._segments / annotation.file_name
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
            absent = {info.id for info in annotation.segments_info} - set(np.unique(ids).tolist())
            if absent:
                raise DatasetError(
                    f"{path} has no pixel of segment {min(absent)}, which its segments_info names "
                    f"({len(absent)} such). Expected red + 256 green + 65536 blue to be the ids "
                    "of its segments: are the JSON and the PNGs of one set?"
                )
            segments = tuple(
                TrueSegment(info.id, self._labels[info.category_id], bool(info.iscrowd))
                for info in annotation.segments_info
                if info.category_id in self._labels
            )
            yield PanopticSample(image, ids, segments)

    def file_of(self, image: int | str) -> Path:
        """The file of an image."""
        return self._images / self._names[image]

    @property
    def first(self) -> Path:
        """The first image's file."""
        return self.file_of(self._annotations[0].image_id)


@dataclass(frozen=True)
class Quality:
    """PQ, and its factors: SQ, the mean IoU of pairs, and RQ, how many segments are in one."""

    pq: float
    sq: float
    rq: float
    classes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"pq": self.pq, "sq": self.sq, "rq": self.rq, "classes": self.classes}


class PanopticCounts:
    """Pairs, false and missed segments of each class, over any number of images.

    Attributes:
        iou: the sum over pairs, (classes,) float64; pairs, false, missed: (classes,) int64.
    """

    def __init__(self, classes: int) -> None:
        self.iou = np.zeros(classes)
        self.pairs, self.false, self.missed = (np.zeros(classes, np.int64) for _ in range(3))

    def add(
        self,
        truth: Ids,
        segments: Iterable[TrueSegment],
        found: Ids,
        labels: dict[int, int],
    ) -> None:
        """Count one image.

        Args:
            truth: (H, W), 0 where there is none.
            segments: of the truth.
            found: (H, W) segments, 0 for none.
            labels: the class of each found segment.
        """
        true = {segment.id: segment for segment in segments}
        both, counts = np.unique(
            truth.astype(np.int64).ravel() * _OFFSET + found.ravel(), return_counts=True
        )
        shared = {divmod(int(b), _OFFSET): int(n) for b, n in zip(both, counts, strict=True)}
        areas: dict[int, int] = {}
        true_areas: dict[int, int] = {}
        for (one, other), count in shared.items():
            true_areas[one] = true_areas.get(one, 0) + count
            areas[other] = areas.get(other, 0) + count
        matched_true, matched = set(), set()
        for (one, other), count in shared.items():
            segment = true.get(one)
            if segment is None or other not in labels or segment.is_crowd:
                continue
            if segment.label != labels[other]:
                continue
            union = true_areas[one] + areas[other] - count - shared.get((0, other), 0)
            if 2 * count > union:
                self.pairs[segment.label] += 1
                self.iou[segment.label] += count / union
                matched_true.add(one)
                matched.add(other)
        crowds = {segment.label: one for one, segment in true.items() if segment.is_crowd}
        for one, segment in true.items():
            if one not in matched_true and not segment.is_crowd:
                self.missed[segment.label] += 1
        for other, label in labels.items():
            if other in matched or other not in areas:
                continue
            excused = shared.get((0, other), 0) + shared.get((crowds.get(label, -1), other), 0)
            if 2 * excused <= areas[other]:
                self.false[label] += 1

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which classes are in the truth or were found."""
        return self.pairs + self.false + self.missed > 0

    def by_class(self) -> NDArray[np.float64]:
        """PQ, SQ and RQ of each class, (classes, 3); 0 of classes that are not `seen`."""
        all_ = self.pairs + 0.5 * self.false + 0.5 * self.missed
        rq = np.divide(self.pairs, all_, out=np.zeros_like(self.iou), where=all_ > 0)
        sq = np.divide(self.iou, self.pairs, out=np.zeros_like(self.iou), where=self.pairs > 0)
        pq = np.divide(self.iou, all_, out=np.zeros_like(self.iou), where=all_ > 0)
        return np.stack([pq, sq, rq], axis=1)

    def quality(self, chosen: Sequence[bool] | None = None) -> Quality:
        """The mean over classes that are `seen`, of those ``chosen`` if given; NaN of none."""
        which = self.seen if chosen is None else self.seen & np.array(chosen)
        if not which.any():
            return Quality(float("nan"), float("nan"), float("nan"), 0)
        pq, sq, rq = self.by_class()[which].mean(0).tolist()
        return Quality(pq, sq, rq, int(which.sum()))
