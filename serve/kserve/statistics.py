"""What a model has done since it was loaded, in the terms of Triton's statistics extension."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

# Which of Triton's durations a stage of ours counts as.
_DURATION_OF = {
    "queue": "queue",
    "decode": "compute_input",
    "preprocess": "compute_input",
    "inference": "compute_infer",
    "postprocess": "compute_output",
    "encode": "compute_output",
}


class Duration:
    """How often something happened, and how long all of it took together."""

    def __init__(self) -> None:
        self.count = self.ns = 0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.ns += round(seconds * 1e9)

    def as_dict(self) -> dict[str, int]:
        """As the protocol writes it."""
        return {"count": self.count, "ns": self.ns}


class ModelStatistics:
    """One model's counts. Used from the event loop only."""

    def __init__(self) -> None:
        names = ("success", "fail", *dict.fromkeys(_DURATION_OF.values()))
        self._durations = {name: Duration() for name in names}
        self._batches: dict[int, Duration] = {}
        self._images = self._last_ms = 0

    def succeeded(self, stages: Iterable[tuple[str, float]], images: int) -> None:
        """Count an answered request.

        :param stages: (name, seconds) of each of its stages.
        """
        seconds = dict.fromkeys(_DURATION_OF.values(), 0.0)
        for stage, taken in stages:
            seconds[_DURATION_OF[stage]] += taken
        for name, taken in seconds.items():
            self._durations[name].add(taken)
        self._durations["success"].add(sum(seconds.values()))
        self._images += images
        self._last_ms = round(time.time() * 1e3)

    def failed(self, seconds: float) -> None:
        """Count a request that was queued and not answered, ``seconds`` after it was."""
        self._durations["fail"].add(seconds)
        self._last_ms = round(time.time() * 1e3)

    def ran(self, images: int, seconds: float) -> None:
        """Count a run of so many images at once."""
        self._batches.setdefault(images, Duration()).add(seconds)

    def as_dict(self, name: str, version: str) -> dict[str, Any]:
        """As the protocol writes it.

        Images are prepared and masks made one by one, so that what a batch of a size took is its
        run's time.
        """
        nothing = Duration().as_dict()
        return {
            "name": name,
            "version": version,
            "last_inference": self._last_ms,
            "inference_count": self._images,
            "execution_count": sum(run.count for run in self._batches.values()),
            "inference_stats": {
                **{name: duration.as_dict() for name, duration in self._durations.items()},
                # There is no response cache here.
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": nothing,
                    "compute_infer": run.as_dict(),
                    "compute_output": nothing,
                }
                for size, run in sorted(self._batches.items())
            ],
        }
