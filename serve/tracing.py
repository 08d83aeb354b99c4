"""OpenTelemetry spans, where it is installed and asked for; nothing otherwise."""

from __future__ import annotations

import time
from typing import Any

from fdconv_deploy.errors import FDConvError


class Tracing:
    """Makes one span per request, with its stages as children.

    The OpenTelemetry SDK is configured by its own environment (OTEL_EXPORTER_OTLP_ENDPOINT and
    the like) or by the program that embeds the service; nothing is configured here.

    :raises FDConvError: asked for, and opentelemetry is not installed.
    """

    def __init__(self, wanted: bool) -> None:
        self._tracer: Any = None
        if not wanted:
            return
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise FDConvError(
                "Tracing was asked for, but opentelemetry is not installed: "
                "pip install 'fdconv-deploy[tracing]'."
            ) from error
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("fdconv.serve")

    def record(
        self, name: str, headers: Any, stages: list[tuple[str, float]], attributes: dict[str, Any]
    ) -> None:
        """Record a request that has just ended.

        :param headers: the request's, for the caller's trace context.
        :param stages: (name, seconds) in the order they happened.
        """
        if self._tracer is None:
            return
        end = time.time_ns()
        start = end - int(sum(seconds for _, seconds in stages) * 1e9)
        carrier = {k: headers[k] for k in ("traceparent", "tracestate") if headers.get(k)}
        parent = self._propagator.extract(carrier)
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=self._trace.SpanKind.SERVER,
            start_time=start,
            attributes=attributes,
        )
        inside = self._trace.set_span_in_context(span, parent)
        for stage, seconds in stages:
            child = self._tracer.start_span(stage, context=inside, start_time=start)
            start += int(seconds * 1e9)
            child.end(end_time=start)
        span.end(end_time=end)
