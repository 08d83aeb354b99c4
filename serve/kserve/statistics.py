"""What a model has done since it was loaded, as Triton's statistics extension describes it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass

# Which of Triton's durations each stage of this service counts as.
_DURATION_OF = {
    "queue": "queue",
    "decode": "compute_input",
    "preprocess": "compute_input",
    "inference": "compute_infer",
    "postprocess": "compute_output",
    "encode": "compute_output",
}


@dataclass
class StatisticDuration:
    """Triton: how often something happened, and how long it took in all."""

    count: int = 0
    ns: int = Field(default=0, description="Nanoseconds.")

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.ns += round(seconds * 1e9)


@dataclass
class InferStatistics:
    """Triton: requests and their stages."""

    success: StatisticDuration = Field(default_factory=StatisticDuration)
    fail: StatisticDuration = Field(default_factory=StatisticDuration)
    queue: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_input: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_infer: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_output: StatisticDuration = Field(default_factory=StatisticDuration)
    cache_hit: StatisticDuration = Field(
        default_factory=StatisticDuration, description="Always 0: there is no response cache."
    )
    cache_miss: StatisticDuration = Field(default_factory=StatisticDuration)


@dataclass
class InferBatchStatistics:
    """Triton: the runs of one batch size.

    Images are prepared and masks made one by one, so a batch's time is that of its run alone.
    """

    batch_size: int
    compute_input: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_infer: StatisticDuration = Field(default_factory=StatisticDuration)
    compute_output: StatisticDuration = Field(default_factory=StatisticDuration)


@dataclass
class ModelStatistics:
    """Triton: what one model has done since it was loaded."""

    name: str
    version: str
    last_inference: int = Field(
        default=0, description="Milliseconds since 1970; 0 before the first."
    )
    inference_count: int = Field(default=0, description="Images answered.")
    execution_count: int = Field(default=0, description="Runs of the network.")
    inference_stats: InferStatistics = Field(default_factory=InferStatistics)
    batch_stats: list[InferBatchStatistics] = Field(default_factory=list)
    response_stats: dict[str, Any] = Field(
        default_factory=dict, description="Always empty: no model streams responses."
    )
    memory_usage: list[Any] = Field(
        default_factory=list, description="Always empty; a model's card says what it holds."
    )

    def succeeded(self, stages: Iterable[tuple[str, float]], images: int) -> None:
        """Count an answered request.

        Args:
            stages: (name, seconds) of each of its stages.
            images: how many it had.
        """
        seconds = dict.fromkeys(_DURATION_OF.values(), 0.0)
        for stage, taken in stages:
            seconds[_DURATION_OF[stage]] += taken
        for name, taken in seconds.items():
            getattr(self.inference_stats, name).add(taken)
        self.inference_stats.success.add(sum(seconds.values()))
        self.inference_count += images
        self.last_inference = round(time.time() * 1e3)

    def failed(self, seconds: float) -> None:
        """Count a request that was queued and not answered, ``seconds`` after it was."""
        self.inference_stats.fail.add(seconds)
        self.last_inference = round(time.time() * 1e3)

    def ran(self, images: int, seconds: float) -> None:
        """Count a run of the network with that many images."""
        self.execution_count += 1
        batch = next((b for b in self.batch_stats if b.batch_size == images), None)
        if batch is None:
            batch = InferBatchStatistics(batch_size=images)
            self.batch_stats.append(batch)
            self.batch_stats.sort(key=lambda entry: entry.batch_size)
        batch.compute_infer.add(seconds)


class ModelStatisticsList(BaseModel):
    """Triton: what models have done."""

    model_stats: list[ModelStatistics]
