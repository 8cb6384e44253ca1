"""OpenTelemetry: one span a request, child of the caller's (W3C trace context). Needs the packages of extra `otel`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from server.config import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

Attributes = Mapping[str, str | bool | int | float | Sequence[str] | None]


class Tracing:
    """Makes spans. `provider` exports them; a caller's wish not to be sampled is heeded."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("outpace")
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER

    @classmethod
    def from_settings(cls, endpoint: str | None, version: str) -> Tracing | None:
        """None where no endpoint is set. Raises ConfigError where the packages are missing."""
        if endpoint is None:
            return None
        try:
            exporters = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            trace = importlib.import_module("opentelemetry.sdk.trace")
            export = importlib.import_module("opentelemetry.sdk.trace.export")
            resources = importlib.import_module("opentelemetry.sdk.resources")
        except ImportError as error:
            raise ConfigError(f"otel_endpoint: {error}; install it with pip install 'outpace[otel]'") from error
        resource = resources.Resource.create({"service.name": "outpace", "service.version": version})
        provider = trace.TracerProvider(resource=resource)
        exporter = exporters.OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=2)
        provider.add_span_processor(export.BatchSpanProcessor(exporter))
        return cls(provider)

    def begin(self, name: str, headers: Mapping[str, str]) -> Span:
        """A span from now on; its parent is what `traceparent` and `tracestate` say."""
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return self._tracer.start_span(name, self._propagator.extract(carrier), self._kind)

    def end(self, span: Span, attributes: Attributes, error: str | None = None) -> None:
        """It ends now. `error` is what went wrong on our side."""
        from opentelemetry.trace import Status, StatusCode

        if span.is_recording():
            known: dict[str, Any] = {name: value for name, value in attributes.items() if value is not None}
            span.set_attributes(known)
            if error is not None:
                span.set_status(Status(StatusCode.ERROR, error))
        span.end()

    def traceparent(self, span: Span) -> str | None:
        """The span in the form in which others continue it."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent")

    def close(self) -> None:
        """Exports what is left; seconds at most."""
        self._provider.shutdown()
