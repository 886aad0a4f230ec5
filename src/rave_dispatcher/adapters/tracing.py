"""Traces by OpenTelemetry: W3C context in and out, spans in the store and by OTLP/HTTP."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rave_dispatcher import __version__
from rave_dispatcher.adapters.logs import current_trace
from rave_dispatcher.adapters.store.sqlite import SpanRow
from rave_dispatcher.domain.events import Trace

COLLECTOR_SECONDS = 3.0  # to take some spans, with all that is tried again
LAST_SPANS_SECONDS = 1.0
_PROPAGATOR = TraceContextTextMapPropagator()


class TimeOrderedIdGenerator(RandomIdGenerator):
    """Trace ids that begin with the time and end in 80 random bits.

    W3C asks for randomness on the right; ids in the order of time keep the store's index dense.
    """

    def generate_trace_id(self) -> int:
        """A new one."""
        now_ms = time.time_ns() // 1_000_000
        # as OpenTelemetry's own: unique, not secret
        return (now_ms & (1 << 48) - 1) << 80 | random.getrandbits(80)


class StoreExporter(SpanExporter):
    """Hands spans to the event store."""

    def __init__(self, post: Callable[[Sequence[SpanRow]], None]) -> None:
        self._post = post

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called by OpenTelemetry's own thread."""
        self._post([_row(s) for s in spans])
        return SpanExportResult.SUCCESS


def _row(span: ReadableSpan) -> SpanRow:
    context = span.get_span_context()
    assert context is not None
    return SpanRow(
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=f"{span.parent.span_id:016x}" if span.parent else None,
        name=span.name,
        start_ns=span.start_time or 0,
        end_ns=span.end_time or 0,
        ok=span.status.status_code is not otel.StatusCode.ERROR,
        attributes=json.dumps(dict(span.attributes or {}), ensure_ascii=False),
    )


class _UntilTheEnd(SpanExporter):
    """Hands spans to another exporter, but once the end has come only for a moment more: what
    waits for a collector that does not answer must not hold up the service's end."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._end: float | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called by OpenTelemetry's own thread."""
        if self._end is not None and time.monotonic() > self._end:
            return SpanExportResult.FAILURE
        return self._exporter.export(spans)

    def end(self) -> None:
        """Begin to end."""
        self._end = time.monotonic() + LAST_SPANS_SECONDS

    def shutdown(self) -> None:
        """End."""
        self._exporter.shutdown()


class Provider(TracerProvider):
    """OpenTelemetry's, which ends in time."""

    collector: _UntilTheEnd | None = None

    def finish(self) -> None:
        """Hand over what is left, and end; takes COLLECTOR_SECONDS more or less."""
        if self.collector is not None:
            self.collector.end()
        self.force_flush()
        self.shutdown()


def make_provider(post: Callable[[Sequence[SpanRow]], None], otlp_endpoint: str | None) -> Provider:
    """Spans go to `post`, and to a collector if there is one."""
    resource = Resource({"service.name": "rave-dispatcher", "service.version": __version__})
    provider = Provider(
        resource=resource, sampler=ALWAYS_ON, id_generator=TimeOrderedIdGenerator(),
        shutdown_on_exit=False,
    )  # fmt: skip
    provider.add_span_processor(
        BatchSpanProcessor(
            StoreExporter(post),
            max_queue_size=16384,
            schedule_delay_millis=500,
            max_export_batch_size=1024,
        )
    )
    if otlp_endpoint:
        # only then: it brings protobuf and requests, 15 MB of memory
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )

        provider.collector = _UntilTheEnd(
            OTLPSpanExporter(otlp_endpoint, timeout=COLLECTOR_SECONDS)
        )
        provider.add_span_processor(BatchSpanProcessor(provider.collector))
    return provider


class OtelSpan:
    """The span port."""

    __slots__ = ("_span", "trace")

    def __init__(self, span: otel.Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.trace = Trace(f"{context.trace_id:032x}", f"{context.span_id:016x}")

    def set(self, name: str, value: str | int | float | bool) -> None:
        """Say more about it."""
        self._span.set_attribute(name, value)

    def rename(self, name: str) -> None:
        """Call it otherwise: what a request is about is known at its end."""
        self._span.update_name(name)

    def fail(self, why: str) -> None:
        """It did not do what it should."""
        self._span.set_status(otel.StatusCode.ERROR, why[:200])

    def end(self) -> None:
        """It is over."""
        self._span.end()


class OtelTracer:
    """The tracer port."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("rave-dispatcher", __version__)

    def start_request(self, name: str, headers: Mapping[str, str]) -> OtelSpan:
        """The span of a request, in the trace that its headers name; `end` it."""
        context = otel_context.Context()
        if "traceparent" in headers:  # a malformed one counts as none
            context = _PROPAGATOR.extract(headers, context)
        return OtelSpan(self._tracer.start_span(name, context, otel.SpanKind.SERVER))

    @contextlib.contextmanager
    def span(
        self, name: str, parent: Trace | None, attributes: Mapping[str, Any] | None = None
    ) -> Iterator[OtelSpan]:
        """A span that ends with the block."""
        context = otel_context.Context()
        if parent is not None:
            context = otel.set_span_in_context(otel.NonRecordingSpan(_remote(parent)), context)
        span = OtelSpan(self._tracer.start_span(name, context, attributes=attributes))
        token = current_trace.set(span.trace.trace_id)
        try:
            yield span
        except Exception as e:
            span.fail(type(e).__name__)
            raise
        finally:
            with contextlib.suppress(ValueError):  # ended in another task than it began
                current_trace.reset(token)
            span.end()


def _remote(trace: Trace) -> otel.SpanContext:
    flags = otel.TraceFlags(otel.TraceFlags.SAMPLED)
    return otel.SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), True, flags)


def traceparent(trace: Trace) -> str:
    """The header (or the variable TRACEPARENT) that hands a trace on."""
    return f"00-{trace.trace_id}-{trace.span_id}-01"
