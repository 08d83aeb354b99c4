"""Accuracy and speed of networks on the same labelled images, side by side in one run.

Nothing here imports torch: a target is whatever answers an image, and `networks` makes them of
bundles and checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.evaluation.datasets import DatasetError
from fdconv_deploy.evaluation.metrics import Score
from fdconv_deploy.latency import Clock, Interleaver
from fdconv_deploy.runtime import Detection, Segmentation


class DataSet(Protocol):
    """Images with what is known of them."""

    def __iter__(self) -> Iterator[Any]:
        """Samples, each with its ``image`` (H, W, C) as the targets take it."""

    def score(self, classes: tuple[str, ...]) -> Score[Any, Any]:
        """What counts the answers of one target of these classes."""


Found = Segmentation | Detection


@dataclass(frozen=True)
class Target:
    """Something that answers images."""

    name: str  # its path
    # Of an image (H, W, C); the answer's timings["inference"] are the network's seconds.
    answer: Callable[[NDArray[Any]], Found]
    classes: tuple[str, ...]
    # For the report: kind, backend, precision, mode if it has any, and the (height, width) that it
    # computes at, if that is one for all images.
    details: dict[str, Any]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)  # by which files are read


@dataclass(frozen=True)
class Result:
    """A target, its score, and how fast it was."""

    target: Target
    score: Score[Any, Any]
    seconds: tuple[float, ...]  # of each image, from decoded pixels to the answer at its size
    inference: tuple[float, ...]  # of each image, of the network alone
    agreement: float  # with the first target over all images, see `Score.same`; 1 of nothing

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the target, its scores, its speed, and what each class scored."""
        milliseconds = {
            "median": np.median(self.seconds),
            "p90": np.percentile(self.seconds, 90),
            "inference_median": np.median(self.inference),
        }
        classes = zip(self.target.classes, self.score.by_class(), strict=True)
        return {
            "name": self.target.name,
            **self.target.details,
            **self.score.summary(),
            "agreement": self.agreement,
            "images_per_second": round(len(self.seconds) / sum(self.seconds), 3),
            "milliseconds": {k: round(float(v) * 1e3, 2) for k, v in milliseconds.items()},
            "classes": [{"name": name, **scored} for name, scored in classes],
        }


@dataclass(frozen=True)
class Evaluation:
    """Targets on the same images: how many, and what their truth holds."""

    results: tuple[Result, ...]
    images: int
    truth: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; scores that are not defined are null."""
        sides = [result.as_dict() for result in self.results]
        return {"images": self.images, **self.truth, "sides": sides}


def evaluate(
    targets: Sequence[Target],
    samples: DataSet,
    *,
    progress: Callable[[int], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> Evaluation:
    """Score targets on images; every image goes through all of them before the next one.

    Decoding images is not timed. ``progress`` is told after each how many were done.

    Raises:
        DatasetError: the targets' classes differ or are not in the data, or nothing counts.
    """
    for target in targets[1:]:
        _check_classes(targets[0], target)
    scores = [samples.score(target.classes) for target in targets]
    timer = Interleaver([target.answer for target in targets], clock)
    inference: list[list[float]] = [[] for _ in targets]
    agreed = np.zeros((len(targets), 2), np.int64)
    images = 0
    for images, sample in enumerate(samples, 1):
        if images == 1:
            timer.warm_up(sample.image)
        answers = timer.round(sample.image)
        for index, answer in enumerate(answers):
            inference[index].append(answer.timings["inference"])
            scores[index].add(sample, answer)
            agreed[index] += scores[index].same(answer, answers[0])
        progress(images)
    results = tuple(
        Result(target, score, tuple(seconds), tuple(spent), same / of if of else 1.0)
        for target, score, seconds, spent, (same, of) in zip(
            targets, scores, timer.seconds, inference, agreed.tolist(), strict=True
        )
    )
    return Evaluation(results, images, scores[0].truth())


def _check_classes(first: Target, other: Target) -> None:
    for number, (one, another) in enumerate(zip_longest(first.classes, other.classes)):
        if one != another:
            raise DatasetError(
                f"The {first.name} has {len(first.classes)} classes, the {other.name} "
                f"{len(other.classes)}, and number {number} is {one!r} in one and {another!r} in "
                "the other: they cannot be compared on the same data."
            )
