"""One span a request, before a scripted engine, with OpenTelemetry's in-memory exporter."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.config import ConfigError, ServerConfig
from server.telemetry.tracing import Tracing
from tests.api.conftest import Live, Serve
from tests.api.fakes import FakeEngine, endless, failing, steps

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Collector:
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    def __post_init__(self) -> None:
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(self.provider)

    async def span(self) -> ReadableSpan:
        async with asyncio.timeout(5):
            while not (spans := self.exporter.get_finished_spans()):  # noqa: ASYNC110 - a test polls
                await asyncio.sleep(0.001)
        (span,) = spans
        return span


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.provider.shutdown()


async def ask(live: Live, headers: dict[str, str] | None = None, **fields: object) -> aiohttp.ClientResponse:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    async with live.http.post(live.url + "/v1/chat/completions", json=body, headers=headers or {}) as response:
        await response.read()
        return response


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span_with_its_phases(serve: Serve, collector: Collector, stream: bool) -> None:
    live = await serve(FakeEngine(steps("Hello", " world"), step_s=0.02), tracing=collector.tracing)
    await ask(live, stream=stream)
    span = await collector.span()
    assert span.name == "POST /v1/chat/completions"
    assert span.kind is SpanKind.SERVER
    found = dict(span.attributes or {})
    expected = {
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.response.model": "fake",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 12,
        "outpace.arm": "control",
        "outpace.stream": stream,
        "outpace.cached_tokens": 1,
        "outpace.draft_tokens": 11,
        "outpace.accepted_draft_tokens": 9,
    }
    assert {name: found.get(name) for name in expected} == expected
    queue_s, prefill_s, ttft_s, decode_s = (
        found[f"outpace.{name}_s"] for name in ("queue", "prefill", "ttft", "decode")
    )
    assert queue_s + prefill_s == pytest.approx(ttft_s)  # type: ignore[operator]
    assert decode_s > 0.01  # type: ignore[operator]
    assert span.start_time is not None and span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 >= ttft_s + decode_s  # type: ignore[operator]
    assert span.status.status_code is StatusCode.UNSET


async def test_the_callers_trace_goes_on(serve: Serve, collector: Collector) -> None:
    live = await serve(tracing=collector.tracing)
    response = await ask(live, {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"})
    span = await collector.span()
    assert span.parent is not None and span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.context.trace_state.get("vendor") == "1"
    assert response.headers["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"


async def test_a_caller_that_is_not_sampled_has_no_span(serve: Serve, collector: Collector) -> None:
    live = await serve(tracing=collector.tracing)
    assert (await ask(live, {"traceparent": f"00-{TRACE}-{PARENT}-00"})).status == 200
    await ask(live)
    assert (await collector.span()).parent is None, "only the second one"


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"])
async def test_what_is_no_context_is_ignored(serve: Serve, collector: Collector, header: str) -> None:
    live = await serve(tracing=collector.tracing)
    response = await ask(live, {"traceparent": header})
    assert (await collector.span()).parent is None
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", response.headers["traceparent"])


async def test_errors(serve: Serve, collector: Collector) -> None:
    live = await serve(FakeEngine(failing("it broke")), tracing=collector.tracing)
    assert (await ask(live, max_tokens=-1)).status == 400
    assert (await collector.span()).status.status_code is StatusCode.UNSET, "the client's fault"
    for stream in (False, True):
        collector.exporter.clear()
        live.engine.script = failing("it broke", "some") if stream else failing("it broke")
        await ask(live, stream=stream)
        span = await collector.span()
        assert span.status.status_code is StatusCode.ERROR
        assert dict(span.attributes or {})["gen_ai.response.finish_reasons"] == ("error",)


async def test_a_client_that_goes_away(serve: Serve, collector: Collector) -> None:
    live = await serve(FakeEngine(endless, step_s=0.005), tracing=collector.tracing)
    body = {"prompt": "Hi", "stream": True, "max_tokens": 200}
    async with live.http.post(live.url + "/v1/completions", json=body) as response:
        await response.content.readany()
    span = await collector.span()
    assert dict(span.attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)


async def test_only_work_is_traced_and_off_means_off(serve: Serve, collector: Collector) -> None:
    live = await serve(tracing=collector.tracing)
    await live.get("/health")
    assert not collector.exporter.get_finished_spans()
    plain = await serve()
    assert "traceparent" not in (await ask(plain, {"traceparent": f"00-{TRACE}-{PARENT}-01"})).headers


def test_settings() -> None:
    assert Tracing.from_settings(None, "1") is None
    with pytest.raises(ConfigError, match=r"otel_endpoint.*http://localhost:4318"):
        ServerConfig(otel_endpoint="localhost:4318")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("server.telemetry.tracing.importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r"outpace\[otel\]"):
        Tracing.from_settings("http://localhost:4318", "1")
