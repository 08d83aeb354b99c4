"""Accuracy and speed of networks on labelled images, side by side in one run.

Nothing here imports torch: a side is whatever labels an image. Bundles come from
`bundle_side`, PyTorch networks from `torch_side`, both opened by `sides.open_sides`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.benchmark.datasets import DatasetError, Sample
from fdconv_deploy.benchmark.metrics import Scores, confusion_matrix, scores
from fdconv_deploy.benchmark.turns import Turns, speed
from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.session import Mode

Labels = NDArray[np.integer]


@dataclass(frozen=True)
class Answer:
    """``labels`` (H, W) of an image, and the seconds that the network itself took of it."""

    labels: Labels
    inference: float


@dataclass(frozen=True)
class Side:
    """Something that labels images: (H, W, 3) uint8 RGB -> `Answer` at the image's size.

    ``name``: its path. ``details``: what it is, for the report: kind, backend, precision,
    mode, and the (height, width) it computes at, if that is one for all images.
    """

    name: str
    answer: Callable[[NDArray[np.uint8]], Answer]
    classes: tuple[str, ...]
    details: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One side's scores and speed.

    Attributes:
        confusion: pixels by (true class, predicted class), int64.
        seconds: of each image, from decoded pixels to labels at the image's size.
        inference: of each image, of the network alone.
    """

    side: Side
    confusion: NDArray[np.int64]
    scores: Scores
    seconds: tuple[float, ...]
    inference: tuple[float, ...]

    @property
    def images_per_second(self) -> float:
        """Images, one after another, over the time they took together."""
        return len(self.seconds) / sum(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; scores that are not defined are null."""
        true = self.confusion.sum(1)
        rows = zip(self.side.classes, self.scores.iou, self.scores.accuracy, true, strict=True)
        return {
            "name": self.side.name,
            **self.side.details,
            "mean_iou": self.scores.mean_iou,
            "pixel_accuracy": self.scores.pixel_accuracy,
            "mean_accuracy": self.scores.mean_accuracy,
            **speed(self.seconds, self.inference),
            "classes": [
                {
                    "name": name,
                    "iou": _defined(iou),
                    "accuracy": _defined(accuracy),
                    "pixels": int(pixels),
                }
                for name, iou, accuracy, pixels in rows
            ],
        }


@dataclass(frozen=True)
class Evaluation:
    """All sides on the same images.

    Attributes:
        images: how many.
        pixels: counted ones.
        agreement: of each side, the share of all pixels that it labels as the first one does.
    """

    results: tuple[Result, ...]
    images: int
    pixels: int
    agreement: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sides = [
            {**result.as_dict(), "agreement": share}
            for result, share in zip(self.results, self.agreement, strict=True)
        ]
        return {"images": self.images, "pixels": self.pixels, "sides": sides}


def bundle_side(session: Session, *, mode: Mode | None = None, fit: Fit | None = None) -> Side:
    """A bundle's side.

    :param session: on the bundle; the caller closes it.
    :param mode: "whole" or "slide"; the one the network was tested in when not given.
    :param fit: see `Session.segment`.
    """

    def answer(image: NDArray[np.uint8]) -> Answer:
        found = session.segment(image, mode=mode, fit=fit)
        return Answer(found.labels, found.timings["inference"])

    details = {
        "kind": "bundle",
        "backend": session.backend,
        "precision": session.bundle.manifest.precision,
        "mode": mode or session.mode,
        "size": list(session.input_size),
    }
    return Side(str(session.bundle.path), answer, session.classes, details)


def evaluate(
    sides: Sequence[Side],
    samples: Iterable[Sample],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Score sides on labelled images.

    They take turns; see `Turns`. Decoding files is not timed.

    :param sides: one or more, all of the same classes.
    :param progress: called with the number of images done after each.
    :raises DatasetError: the sides' classes differ, or no pixel counts.
    """
    first = sides[0]
    for side in sides[1:]:
        if side.classes != first.classes:
            raise DatasetError(
                f"The {first.name} has {len(first.classes)} classes ({_some(first.classes)}), the "
                f"{side.name} {len(side.classes)} ({_some(side.classes)}): they cannot be "
                "compared on the same masks."
            )
    count = len(first.classes)
    confusions = [np.zeros((count, count), np.int64) for _ in sides]
    same = np.zeros(len(sides), np.int64)
    turns = Turns([side.answer for side in sides])
    images = pixels = 0
    for sample, answers in turns.over(samples):
        for index, answer in enumerate(answers):
            confusions[index] += confusion_matrix(sample.truth, answer.labels, count)
            same[index] += int((answer.labels == answers[0].labels).sum())
        images, pixels = images + 1, pixels + sample.truth.size
        progress(images)
    counted = int(confusions[0].sum())
    if not counted:
        raise DatasetError(
            f"Of {images} images no pixel counts: the masks hold nothing but labels to ignore."
        )
    results = tuple(
        Result(side, confusion, scores(confusion), tuple(spent), tuple(inside))
        for side, confusion, spent, inside in zip(
            sides, confusions, turns.seconds, turns.inference, strict=True
        )
    )
    return Evaluation(results, images, counted, tuple((same / pixels).tolist()))


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
