"""Several networks timed beside each other, image by image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray


class Pictured(Protocol):
    """A sample of a data set: an image, and whatever is known of it."""

    @property
    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB."""


class Timed(Protocol):
    """What a network answers."""

    @property
    def inference(self) -> float:
        """The seconds that the network itself took."""


S = TypeVar("S", bound=Pictured)
A = TypeVar("A", bound=Timed)


class Turns(Generic[A]):
    """Every image goes through all networks before the next one.

    They take turns in going first, so that a machine's drift hits all alike. Each sees the
    first image once before anything is timed. Making the samples is not timed.

    ``seconds`` and ``inference``: of each network, of each image; from decoded pixels to the
    answer, and of the network alone.
    """

    def __init__(self, networks: Sequence[Callable[[NDArray[np.uint8]], A]]) -> None:
        self._networks = tuple(networks)
        self.seconds: list[list[float]] = [[] for _ in networks]
        self.inference: list[list[float]] = [[] for _ in networks]

    def over(self, samples: Iterable[S]) -> Iterator[tuple[S, list[A]]]:
        """Each sample, and all networks' answers in their own order."""
        count = len(self._networks)
        for number, sample in enumerate(samples):
            if number == 0:
                for network in self._networks:
                    network(sample.image)
            answers: dict[int, A] = {}
            for turn in range(count):
                index = (turn + number) % count
                start = time.perf_counter()
                answers[index] = self._networks[index](sample.image)
                self.seconds[index].append(time.perf_counter() - start)
                self.inference[index].append(answers[index].inference)
            yield sample, [answers[index] for index in range(count)]


def speed(seconds: Sequence[float], inference: Sequence[float]) -> dict[str, Any]:
    """A network's times for JSON: images a second one after another, and milliseconds."""
    return {
        "images_per_second": round(len(seconds) / sum(seconds), 3),
        "milliseconds": {
            "median": round(float(np.median(seconds)) * 1e3, 2),
            "p90": round(float(np.percentile(seconds, 90)) * 1e3, 2),
            "inference_median": round(float(np.median(inference)) * 1e3, 2),
        },
    }
