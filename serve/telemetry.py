"""What the service tells of itself: its log, Prometheus metrics, and OpenTelemetry spans."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Literal, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from uvicorn.config import LOGGING_CONFIG
from uvicorn.logging import DefaultFormatter

from fdconv_deploy.environment import needed_by
from fdconv_deploy.errors import FDConvError

access = logging.getLogger("fdconv.access")
M = TypeVar("M", Counter, Histogram)
Stages = list[tuple[str, float]]  # name and seconds of each, in order


def milliseconds(stages: Stages) -> dict[str, float]:
    """Milliseconds by stage."""
    return {name: round(seconds * 1e3, 3) for name, seconds in stages}


def log_access(*, probe: bool = False, **fields: Any) -> None:
    """Write one request's line, or object of JSON; for a ``probe`` that is well, below INFO."""
    level = logging.DEBUG if probe else logging.INFO
    if access.isEnabledFor(level):
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
        access.log(level, "%s", text, extra={"fields": fields})


class _InUtc(logging.Formatter):
    converter = time.gmtime  # type: ignore[assignment]
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03d+00:00"


class TextFormatter(_InUtc, DefaultFormatter):
    """A record as uvicorn writes it, with the time in UTC."""


class JsonFormatter(_InUtc):
    """A record as one line of JSON; what was passed as ``extra={"fields": {...}}`` beside it."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        found: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def log_config(level: str, form: Literal["text", "json"]) -> dict[str, Any]:
    """The logging of uvicorn and the service, for ``logging.config``."""
    config = copy.deepcopy(LOGGING_CONFIG)
    # The service writes its own access log, with request ids and timings.
    config["loggers"].pop("uvicorn.access", None)
    for name in ("fdconv.serve", "fdconv.access"):
        config["loggers"][name] = {"handlers": ["default"], "level": level.upper()}
    if form == "json":
        config["formatters"]["default"] = {"()": JsonFormatter}
    else:
        default = config["formatters"]["default"]
        default |= {"()": TextFormatter, "fmt": f"%(asctime)s {default['fmt']}"}
    return config


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COUNTED_AFTER_SECONDS = 0.1
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


def _metric(kind: type[M], *arguments: Any, **options: Any) -> M:
    """A metric that keeps what :meth:`labels` found: looking it up takes longer than counting."""
    metric = kind(*arguments, **options)
    metric.labels = cache(metric.labels)  # type: ignore[method-assign]
    return metric


class Metrics:
    """One application's counters, apart from any other's."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._uncounted: list[tuple[Callable[..., None], Any]] = []
        ProcessCollector(registry=self._registry)
        counter = partial(_metric, Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        histogram = partial(_metric, Histogram, registry=self._registry)
        self.requests = counter("fdconv_requests", "Requests answered.", ["route", "status"])
        self.key_requests = counter(
            "fdconv_key_requests", "Requests by API key, called as in the access log.", ["key"]
        )
        self.request_seconds = histogram(
            "fdconv_request_seconds",
            "From a request's headers to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
        )
        self.stage_seconds = histogram(
            "fdconv_stage_seconds",
            "Seconds by stage: decode, preprocess, queue, inference, postprocess, encode.",
            ["model", "stage"],
            buckets=_SECONDS,
        )
        self.images = counter("fdconv_images", "Images segmented.", ["model"])
        self.batch_size = histogram(
            "fdconv_batch_size", "Images per inference run.", ["model"], buckets=_BATCHES
        )
        self.rejected = counter("fdconv_rejected", "Requests turned away, by reason.", ["reason"])
        self.deaths = counter("fdconv_worker_deaths", "Workers that ended and were replaced.")
        self.model_bytes = gauge(
            "fdconv_model_bytes", "Memory a loaded model holds at least.", ["model"]
        )
        self.loads = counter("fdconv_model_loads", "Times a model was loaded.", ["model"])

    def answered(self, route: str, status: str, seconds: float, key: str) -> None:
        """Count a request that was answered within ``seconds``; ``key`` is empty without one."""
        self.requests.labels(route, status).inc()
        self.request_seconds.labels(route).observe(seconds)
        if key:  # addresses are too many to be labels
            self.key_requests.labels(key).inc()

    def later(self, count: Callable[..., None], *what: Any) -> None:
        """Call ``count`` when there is time, together with others; on the event loop.

        After an inference no cache of the processor holds what that takes.
        """
        self._uncounted.append((count, what))
        if len(self._uncounted) == 1:
            asyncio.get_running_loop().call_later(_COUNTED_AFTER_SECONDS, self.settle)

    def settle(self) -> None:
        """Count what is not counted yet."""
        uncounted, self._uncounted = self._uncounted, []
        for count, what in uncounted:
            count(*what)

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read when it is asked for."""
        Gauge(name, documentation, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """All of it."""
        self.settle()
        return generate_latest(self._registry)


class Tracing:
    """Makes the spans, and sends them where OpenTelemetry's own environment says.

    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and the like are read
    by its SDK; OTEL_TRACES_EXPORTER is "otlp" (over HTTP), "console" or "none". A program that
    embeds the service and has set a tracer provider of its own gets the spans there.
    """

    def __init__(self, wanted: bool) -> None:
        self._tracer: Any = None
        self._own: Any = None
        if not wanted:
            return
        with needed_by("Tracing", "tracing"):
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            provider = trace.get_tracer_provider()
            if isinstance(provider, trace.ProxyTracerProvider):  # nobody has set one
                provider = self._own = _provider()
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = provider.get_tracer("fdconv.serve")

    def record(
        self,
        name: str,
        headers: Mapping[str, str],
        seconds: float,
        stages: Stages,
        attributes: dict[str, Any],
        *,
        failed: bool = False,
    ) -> None:
        """Record a request that has just ended, and took so many seconds.

        Its headers may hold the caller's trace context; ``failed`` is the service's fault.
        """
        if self._tracer is None:
            return
        end = time.time_ns()
        start = end - int(seconds * 1e9)
        carrier = {k: headers[k] for k in ("traceparent", "tracestate") if headers.get(k)}
        parent = self._propagator.extract(carrier)
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=self._trace.SpanKind.SERVER,
            start_time=start,
            attributes=attributes,
        )
        if failed:
            span.set_status(self._trace.StatusCode.ERROR)
        inside = self._trace.set_span_in_context(span, parent)
        for stage, lasted in stages:
            child = self._tracer.start_span(stage, context=inside, start_time=start)
            start = min(start + int(lasted * 1e9), end)
            child.end(end_time=start)
        span.end(end_time=end)

    def close(self) -> None:
        """Send what has not been sent yet."""
        if self._own is not None:
            self._own.shutdown()


def _provider() -> Any:
    """A provider as the environment configures it."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in given
    name = {} if named else {"service.name": "fdconv-deploy"}
    provider = TracerProvider(resource=Resource.create(name))
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if exporter == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    elif exporter == "console":
        provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
    elif exporter != "none":
        raise FDConvError(
            f"OTEL_TRACES_EXPORTER is {exporter!r}, which is not understood here. Set it to "
            "'otlp', 'console' or 'none'."
        )
    return provider
