"""OpenTelemetry spans: one per request, with its stages inside."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fdconv_deploy.environment import needed_by
from fdconv_deploy.errors import FDConvError

_SERVICE = "fdconv-deploy"


class Tracing:
    """Makes the spans, and sends them where OpenTelemetry's own environment says.

    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and the like are read
    by its SDK; OTEL_TRACES_EXPORTER is "otlp" (over HTTP), "console" or "none". A program that
    embeds the service and has set a tracer provider of its own gets the spans there.

    :raises FDConvError: asked for, and opentelemetry is not installed or told something else.
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

    @property
    def wanted(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    def record(
        self,
        name: str,
        headers: Mapping[str, str],
        seconds: float,
        stages: Sequence[tuple[str, float]],
        attributes: dict[str, Any],
        *,
        failed: bool = False,
    ) -> None:
        """Record a request that has just ended.

        :param headers: the request's, for the caller's trace context.
        :param seconds: what it took in all.
        :param stages: (name, seconds) in the order they happened.
        :param failed: it was the service's fault.
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

    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": _SERVICE}))
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
