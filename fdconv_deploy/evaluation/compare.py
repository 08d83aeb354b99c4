"""Accuracy and speed of networks on the same labelled images, side by side in one run.

Nothing here imports torch: a target is whatever answers an image, and `targets` makes them of
bundles and checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.evaluation.coco import AveragePrecision, CocoSet, average_precision
from fdconv_deploy.evaluation.coco_annotations import Annotations
from fdconv_deploy.evaluation.datasets import DatasetError, Sample
from fdconv_deploy.evaluation.metrics import Scores, confusion_matrix, scores
from fdconv_deploy.evaluation.panoptic import PanopticCounts, PanopticSet, Quality
from fdconv_deploy.latency import Clock, Interleaver
from fdconv_deploy.runtime import Detection
from fdconv_deploy.runtime.detection import SHOWN_SCORE
from fdconv_deploy.runtime.panoptic import PanopticSegmentation

Labels = NDArray[np.integer]
"""(H, W), at the image's size: what a segmentation network finds."""

# Two objects of one class are the same from this intersection over union on.
_SAME = 0.9


class Pictured(Protocol):
    """A sample of a data set: an image, and whatever is known of it."""

    @property
    def image(self) -> NDArray[Any]:
        """(H, W, C), as the targets take it."""


S = TypeVar("S", bound=Pictured)
F = TypeVar("F")


@dataclass(frozen=True)
class Answer(Generic[F]):
    """``found`` in an image, and the seconds that the network itself took of it."""

    found: F
    inference: float


@dataclass(frozen=True)
class Target(Generic[F]):
    """Something that answers images.

    Attributes:
        name: its path.
        answer: (H, W, C) -> `Answer`.
        classes: their names.
        details: for the report: kind, backend, precision, mode if it has any, and the
            (height, width) that it computes at, if that is one for all images.
        preprocessing: of its images, by which files are decoded for it.
    """

    name: str
    answer: Callable[[NDArray[Any]], Answer[F]]
    classes: tuple[str, ...]
    details: dict[str, Any]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


@dataclass(frozen=True)
class Timed(Generic[F]):
    """A target and how fast it was.

    Attributes:
        seconds: of each image, from decoded pixels to the answer at the image's size.
        inference: of each image, of the network alone.
        agreement: with the first target: the share of all pixels of the same class, or of a
            detector see `DetectionResult`.
    """

    target: Target[F]
    seconds: tuple[float, ...]
    inference: tuple[float, ...]
    agreement: float

    @property
    def images_per_second(self) -> float:
        """Images, one after another, over the time they took together."""
        return len(self.seconds) / sum(self.seconds)

    def report(self, scored: dict[str, Any], classes: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """For JSON: the target, its scores, its speed, and what each class scored."""
        milliseconds = {
            "median": np.median(self.seconds),
            "p90": np.percentile(self.seconds, 90),
            "inference_median": np.median(self.inference),
        }
        return {
            "name": self.target.name,
            **self.target.details,
            **scored,
            "agreement": self.agreement,
            "images_per_second": round(self.images_per_second, 3),
            "milliseconds": {k: round(float(v) * 1e3, 2) for k, v in milliseconds.items()},
            "classes": [
                {"name": name, **one}
                for name, one in zip(self.target.classes, classes, strict=True)
            ],
        }


@dataclass(frozen=True)
class Result(Timed[Labels]):
    """A segmentor's scores and speed.

    Attributes:
        confusion: pixels by (true class, predicted class), int64.
    """

    confusion: NDArray[np.int64]
    scores: Scores

    def as_dict(self) -> dict[str, Any]:
        """For JSON; scores that are not defined are null."""
        found = self.scores
        summary = {
            "mean_iou": found.mean_iou,
            "pixel_accuracy": found.pixel_accuracy,
            "mean_accuracy": found.mean_accuracy,
        }
        rows = zip(found.iou, found.accuracy, self.confusion.sum(1), strict=True)
        return self.report(
            summary,
            (
                {"iou": _defined(iou), "accuracy": _defined(accuracy), "pixels": int(pixels)}
                for iou, accuracy, pixels in rows
            ),
        )


@dataclass(frozen=True)
class Evaluation:
    """Segmentors on the same images.

    Attributes:
        images: how many.
        pixels: counted ones.
    """

    results: tuple[Result, ...]
    images: int
    pixels: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sides = [result.as_dict() for result in self.results]
        return {"images": self.images, "pixels": self.pixels, "sides": sides}


@dataclass(frozen=True)
class DetectionResult(Timed[Detection]):
    """A detector's scores and speed. ``masks`` is None where it or the data has none.

    Attributes:
        objects: found ones.
        agreement: the share of the objects scored 0.3 or more, its own and the first target's,
            that have a partner of the same class in the other with an IoU of 0.9 or more; 1
            when there are none.
    """

    boxes: AveragePrecision
    masks: AveragePrecision | None
    objects: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON; scores that are not defined are null."""
        found = {"box": self.boxes, "mask": self.masks}
        summary = {
            **{kind: score and score.as_dict() for kind, score in found.items()},
            "objects": self.objects,
        }
        by_class = {f"{kind}_ap": score.classes for kind, score in found.items() if score}
        rows = zip(*by_class.values(), strict=True)
        return self.report(
            summary, (dict(zip(by_class, map(_defined, row), strict=True)) for row in rows)
        )


@dataclass(frozen=True)
class DetectionEvaluation:
    """Detectors on the same images.

    Attributes:
        objects: annotated in them.
        crowds: of these, those that COCO's code takes for a crowd and does not score.
        checked: what of the annotations does not count, or counts and is odd.
    """

    results: tuple[DetectionResult, ...]
    images: int
    objects: int
    crowds: int
    checked: Annotations

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "images": self.images,
            "objects": self.objects,
            "crowds": self.crowds,
            "left_out": [vars(finding) for finding in self.checked.left_out],
            "noted": [vars(finding) for finding in self.checked.noted],
            "sides": [result.as_dict() for result in self.results],
        }


@dataclass(frozen=True)
class PanopticResult(Timed[PanopticSegmentation]):
    """A panoptic network's quality and speed.

    Attributes:
        counts: of all images.
        things: of each class, whether it is one of objects.
    """

    counts: PanopticCounts
    things: tuple[bool, ...]

    @property
    def qualities(self) -> dict[str, Quality]:
        """Of all classes, of things and of stuff."""
        stuff = tuple(not thing for thing in self.things)
        return {
            "all": self.counts.quality(),
            "things": self.counts.quality(self.things),
            "stuff": self.counts.quality(stuff),
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON; scores that are not defined are null."""
        scored = {
            kind: {name: _defined(value) for name, value in quality.as_dict().items()}
            for kind, quality in self.qualities.items()
        }
        rows = zip(self.counts.by_class().tolist(), self.counts.seen.tolist(), strict=True)
        classes: list[dict[str, Any]] = [
            dict(zip(("pq", "sq", "rq"), row if seen else (None,) * 3, strict=True))
            for row, seen in rows
        ]
        nothing: dict[str, Any] = dict.fromkeys(("pq", "sq", "rq"))  # of what is in no segment
        return self.report({"panoptic": scored}, [*classes, nothing])


@dataclass(frozen=True)
class PanopticEvaluation:
    """Panoptic networks on the same images."""

    results: tuple[PanopticResult, ...]
    images: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"images": self.images, "sides": [result.as_dict() for result in self.results]}


def evaluate_panoptic(
    targets: Sequence[Target[PanopticSegmentation]],
    data: PanopticSet,
    *,
    progress: Callable[[int], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> PanopticEvaluation:
    """Score panoptic networks on images with true segments, in turn.

    Args:
        targets: one or more, all of the same classes, which ``data`` was read for.
        data: decoding its files is not timed.
        progress: called with the number of images done after each.
        clock: seconds, as `time.perf_counter` gives them.

    Raises:
        DatasetError: the targets' classes differ, or a file cannot be read.
    """
    rounds = _Rounds(targets, clock)
    counts = [PanopticCounts(len(data.things)) for _ in targets]
    same, pixels = np.zeros(len(targets), np.int64), 0
    for sample, answers in rounds.over(data, progress):
        pixels += sample.ids.size
        for index, answer in enumerate(answers):
            labels = {segment.id: segment.label for segment in answer.segments}
            counts[index].add(sample.ids, sample.segments, answer.ids, labels)
            same[index] += int((answer.labels == answers[0].labels).sum())
    results = tuple(
        PanopticResult(*rounds.timed(index), float(share / pixels), counts[index], data.things)
        for index, share in enumerate(same)
    )
    return PanopticEvaluation(results, len(data))


def evaluate(
    targets: Sequence[Target[Labels]],
    samples: Iterable[Sample],
    *,
    progress: Callable[[int], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> Evaluation:
    """Score segmentors on labelled images, in turn. Decoding files is not timed.

    Args:
        targets: one or more, all of the same classes.
        samples: at least one of them with pixels that count.
        progress: called with the number of images done after each.
        clock: seconds, as `time.perf_counter` gives them.

    Raises:
        DatasetError: the targets' classes differ, or no pixel counts.
    """
    rounds = _Rounds(targets, clock)
    count = len(targets[0].classes)
    confusions = [np.zeros((count, count), np.int64) for _ in targets]
    same = np.zeros(len(targets), np.int64)
    images = pixels = 0
    for sample, answers in rounds.over(samples, progress):
        for index, labels in enumerate(answers):
            confusions[index] += confusion_matrix(sample.truth, labels, count)
            same[index] += int((labels == answers[0]).sum())
        images, pixels = images + 1, pixels + sample.truth.size
    counted = int(confusions[0].sum())
    if not counted:
        raise DatasetError(
            f"Of {images} images no pixel counts: the masks hold nothing but labels to ignore."
        )
    results = tuple(
        Result(*rounds.timed(index), float(same[index] / pixels), confusion, scores(confusion))
        for index, confusion in enumerate(confusions)
    )
    return Evaluation(results, images, counted)


def evaluate_detectors(
    targets: Sequence[Target[Detection]],
    data: CocoSet,
    *,
    progress: Callable[[int], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> DetectionEvaluation:
    """Score detectors on annotated images, all the objects they give, in turn.

    Args:
        targets: one or more, all of the same classes.
        data: annotated images. Decoding them is not timed.
        progress: called with the number of images done after each.
        clock: seconds, as `time.perf_counter` gives them.

    Raises:
        DatasetError: the targets' classes differ, or are not in the data.
    """
    rounds = _Rounds(targets, clock)
    categories = data.category_ids(targets[0].classes)
    found: list[list[dict[str, Any]]] = [[] for _ in targets]
    paired, shown = np.zeros(len(targets)), np.zeros(len(targets))
    masks = [data.has_masks for _ in targets]
    for sample, answers in rounds.over(data, progress):
        for index, answer in enumerate(answers):
            masks[index] &= answer.has_masks
            found[index] += coco_results(answer, sample.number, categories, masks[index])
            both = [answer.kept(SHOWN_SCORE), answers[0].kept(SHOWN_SCORE)]
            paired[index] += 2 * _pairs(*both)
            shown[index] += len(both[0]) + len(both[1])
    results = tuple(
        DetectionResult(
            *rounds.timed(index),
            float(paired[index] / shown[index]) if shown[index] else 1.0,
            average_precision(data, found[index], categories, "bbox"),
            average_precision(data, found[index], categories, "segm") if masks[index] else None,
            len(found[index]),
        )
        for index in range(len(targets))
    )
    objects = data.truth["annotations"]
    crowds = sum(entry["iscrowd"] for entry in objects)
    return DetectionEvaluation(results, len(data), len(objects), crowds, data.checked)


def coco_results(
    found: Detection, image: int, categories: Sequence[int], masks: bool
) -> list[dict[str, Any]]:
    """Objects as COCO's result files have them.

    Args:
        found: in one image.
        image: the image's id.
        categories: each class's category id.
        masks: whether to add ``segmentation``.
    """
    sizes = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], axis=1)
    rows: list[dict[str, Any]] = [
        {"image_id": image, "category_id": categories[label], "bbox": box, "score": score}
        for label, box, score in zip(
            found.labels.tolist(), sizes.tolist(), found.scores.tolist(), strict=True
        )
    ]
    if masks:
        for row, rle in zip(rows, found.rle(), strict=True):
            row["segmentation"] = rle
    return rows


class _Rounds(Generic[F]):
    """Lets every image go through all targets before the next one; see `Interleaver`."""

    def __init__(self, targets: Sequence[Target[F]], clock: Clock) -> None:
        for target in targets[1:]:
            _check_classes(targets[0], target)
        self._targets = targets
        self._timer = Interleaver([target.answer for target in targets], clock)
        self._inference: list[list[float]] = [[] for _ in targets]

    def over(
        self, samples: Iterable[S], progress: Callable[[int], None]
    ) -> Iterator[tuple[S, list[F]]]:
        """Each sample, and what all targets found in it, in their own order."""
        for number, sample in enumerate(samples, 1):
            if number == 1:
                self._timer.warm_up(sample.image)
            answers = self._timer.round(sample.image)
            for spent, answer in zip(self._inference, answers, strict=True):
                spent.append(answer.inference)
            yield sample, [answer.found for answer in answers]
            progress(number)

    def timed(self, index: int) -> tuple[Target[F], tuple[float, ...], tuple[float, ...]]:
        """A target and its times so far: what `Timed` holds of it."""
        seconds, inference = self._timer.seconds[index], self._inference[index]
        return self._targets[index], tuple(seconds), tuple(inference)


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _check_classes(first: Target, other: Target) -> None:
    pairs = zip_longest(first.classes, other.classes)
    differ = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if differ is not None:
        raise DatasetError(
            f"The {first.name} has {len(first.classes)} classes ({_some(first.classes, differ)}), "
            f"the {other.name} {len(other.classes)} ({_some(other.classes, differ)}): they cannot "
            "be compared on the same data."
        )


def _some(names: Sequence[str], last: int) -> str:
    """Three of the names, up to the ``last`` one if it is not among the first three."""
    start = max(0, last - 2)
    shown = ["…"] * (start > 0) + list(names[start : start + 3]) + ["…"] * (len(names) > start + 3)
    return ", ".join(shown)


def _pairs(ours: Detection, theirs: Detection) -> int:
    """How many objects of one have a partner in the other, each in one pair at most."""
    if not len(ours) or not len(theirs):
        return 0
    overlap = _iou(ours.boxes, theirs.boxes)
    overlap[ours.labels[:, None] != theirs.labels] = 0
    pairs = 0
    while overlap.max() >= _SAME:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        pairs += 1
    return pairs


def _iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, 4) and (M, 4) boxes [x1, y1, x2, y2] -> (N, M) intersections over unions."""
    first, second = a.astype(np.float64)[:, None], b.astype(np.float64)[None]
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(
        first[..., :2], second[..., :2]
    )
    shared = np.clip(sides, 0, None).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    union = areas[0] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
