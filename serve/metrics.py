"""What the service counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One application's counters, apart from any other's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        make: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter(
            "fdconv_requests", "Requests answered.", ["route", "status"], **make
        )
        self.request_seconds = Histogram(
            "fdconv_request_seconds",
            "From a request's headers to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            **make,
        )
        self.stage_seconds = Histogram(
            "fdconv_stage_seconds",
            "Seconds by stage: decode, preprocess, queue, inference, postprocess, encode.",
            ["model", "stage"],
            buckets=_SECONDS,
            **make,
        )
        self.images = Counter("fdconv_images", "Images segmented.", ["model"], **make)
        self.batch_size = Histogram(
            "fdconv_batch_size", "Images per inference run.", ["model"], buckets=_BATCHES, **make
        )
        self.rejected = Counter(
            "fdconv_rejected",
            "Requests turned away, by reason.",
            ["reason"],
            **make,
        )
        self.deaths = Counter(
            "fdconv_worker_deaths", "Workers that ended and were replaced.", **make
        )
        self.model_bytes = Gauge(
            "fdconv_model_bytes", "Memory a loaded model holds at least.", ["model"], **make
        )
        self.loads = Counter("fdconv_model_loads", "Times a model was loaded.", ["model"], **make)
        self._make = make

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read when it is asked for."""
        Gauge(name, documentation, **self._make).set_function(read)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
