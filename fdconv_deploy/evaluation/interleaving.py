"""Several networks beside each other on the same images: sides, which take turns.

Nothing here imports torch: a side is whatever answers an image.
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
from fdconv_deploy.evaluation.datasets import DatasetError
from fdconv_deploy.runtime import Session


class Pictured(Protocol):
    """A sample of a data set: an image, and whatever is known of it."""

    @property
    def image(self) -> NDArray[Any]:
        """(H, W, C), as the sides take it."""


S = TypeVar("S", bound=Pictured)
F = TypeVar("F")


@dataclass(frozen=True)
class Answer(Generic[F]):
    """``found`` in an image, and the seconds that the network itself took of it."""

    found: F
    inference: float


@dataclass(frozen=True)
class Side(Generic[F]):
    """Something that answers images: (H, W, C) -> `Answer`.

    ``preprocessing``: of the network's images, by which files are decoded for it.
    ``name``: its path. ``details``: what it is, for the report: kind, backend, precision,
    mode if it has any, and the (height, width) it computes at, if that is one for all images.
    """

    name: str
    answer: Callable[[NDArray[Any]], Answer[F]]
    classes: tuple[str, ...]
    details: dict[str, Any]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


@dataclass(frozen=True)
class Timed(Generic[F]):
    """A side and how fast it was.

    Attributes:
        seconds: of each image, from decoded pixels to the answer at the image's size.
        inference: of each image, of the network alone.
    """

    side: Side[F]
    seconds: tuple[float, ...]
    inference: tuple[float, ...]

    @property
    def images_per_second(self) -> float:
        """Images, one after another, over the time they took together."""
        return len(self.seconds) / sum(self.seconds)

    def report(self, scores: dict[str, Any], classes: list[dict[str, Any]]) -> dict[str, Any]:
        """For JSON: what it is, its scores, its speed, and what each class scored."""
        return {
            "name": self.side.name,
            **self.side.details,
            **scores,
            "images_per_second": round(self.images_per_second, 3),
            "milliseconds": {
                "median": _milliseconds(np.median(self.seconds)),
                "p90": _milliseconds(np.percentile(self.seconds, 90)),
                "inference_median": _milliseconds(np.median(self.inference)),
            },
            "classes": [
                {"name": name, **scored}
                for name, scored in zip(self.side.classes, classes, strict=True)
            ],
        }


class Turns(Generic[F]):
    """Every image goes through all sides before the next one.

    They take turns in going first, so that a machine's drift hits all alike. Each sees the
    first image once before anything is timed. Making the samples is not timed.

    :param sides: one or more, all of the same classes.
    :raises DatasetError: the sides' classes differ.
    """

    def __init__(self, sides: Sequence[Side[F]]) -> None:
        for side in sides[1:]:
            _check_classes(sides[0], side)
        self._sides = tuple(sides)
        self._seconds: list[list[float]] = [[] for _ in sides]
        self._inference: list[list[float]] = [[] for _ in sides]

    def over(
        self, samples: Iterable[S], progress: Callable[[int], None]
    ) -> Iterator[tuple[S, list[F]]]:
        """Each sample, and what all sides found in it, in their own order.

        :param progress: called with the number of images done after each.
        """
        count = len(self._sides)
        for number, sample in enumerate(samples):
            if number == 0:
                for side in self._sides:
                    side.answer(sample.image)
            found: dict[int, F] = {}
            for turn in range(count):
                index = (turn + number) % count
                start = time.perf_counter()
                answer = self._sides[index].answer(sample.image)
                self._seconds[index].append(time.perf_counter() - start)
                self._inference[index].append(answer.inference)
                found[index] = answer.found
            yield sample, [found[index] for index in range(count)]
            progress(number + 1)

    def timed(self, index: int) -> tuple[Side[F], tuple[float, ...], tuple[float, ...]]:
        """A side and its times so far: what `Timed` holds of it."""
        return self._sides[index], tuple(self._seconds[index]), tuple(self._inference[index])


def bundle_details(session: Session, **more: Any) -> dict[str, Any]:
    """What a bundle's side is, for the report."""
    return {
        "kind": "bundle",
        "backend": session.backend,
        "operators": session.operators,
        "precision": session.bundle.manifest.precision,
        **more,
        "size": list(session.input_size),
    }


def _milliseconds(seconds: np.floating) -> float:
    return round(float(seconds) * 1e3, 2)


def _check_classes(first: Side, other: Side) -> None:
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
