"""The span of a request: what it asked, how long each phase took, how well drafting went."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

from server.api.access.access_log import record_of
from server.api.access.request_id import REQUEST_ID
from server.api.access.route import route_of
from server.api.arms import ARM
from server.api.errors import Handler
from server.api.generation import Part
from server.telemetry.tracing import Attributes, Tracing

PARTS: web.RequestKey[Sequence[Part]] = web.RequestKey("parts", list)
"""The choices that were generated for a request."""
TRACEPARENT: web.RequestKey[str | None] = web.RequestKey("traceparent", str)
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class Traces:
    """A middleware that gives each request of work its span."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    @property
    def middleware(self) -> Middleware:
        """Outside of what turns errors into answers: it sees the status that leaves."""

        @web.middleware
        async def trace(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method != "POST":
                return await handler(request)
            span = self._tracing.begin(f"POST {route_of(request)}", request.headers)
            request[TRACEPARENT] = self._tracing.traceparent(span)
            status: int | None = None
            try:
                response = await handler(request)
                status = response.status
                return response
            finally:
                error = _error(request, status)
                self._tracing.end(span, _attributes(request, status), error)

        return trace


async def add_traceparent(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: the span's own id, as `traceparent`, with which a client can find it."""
    traceparent = request.get(TRACEPARENT)
    if traceparent is not None:
        response.headers["traceparent"] = traceparent


def _error(request: web.Request, status: int | None) -> str | None:
    code = record_of(request).error_code
    if status is None:
        return "the client went away"
    return code or f"status {status}" if status >= 500 or (status == 200 and code) else None


def _attributes(request: web.Request, status: int | None) -> Attributes:
    """Names of OpenTelemetry's conventions for HTTP and generative models where there is one."""
    parts, arm, record = request.get(PARTS, []), request.get(ARM), record_of(request)
    timers = [part.timer for part in parts]
    tallies = [part.text.tally for part in parts]
    reasons = [timer.reason.value for timer in timers if timer.reason is not None]
    return {
        "http.request.method": request.method,
        "http.route": route_of(request),
        "http.response.status_code": status,
        "gen_ai.operation.name": _OPERATIONS.get(route_of(request)),
        "gen_ai.response.id": request.get(REQUEST_ID),
        "gen_ai.response.model": None if arm is None else arm.model_name,
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens if parts else None,
        "gen_ai.usage.output_tokens": record.completion_tokens if parts else None,
        "outpace.arm": None if arm is None else arm.name,
        "outpace.stream": record.stream if parts else None,
        "outpace.queue_s": min((t.queue_s for t in timers if t.queue_s is not None), default=None),
        "outpace.prefill_s": min((t.prefill_s for t in timers if t.prefill_s is not None), default=None),
        "outpace.ttft_s": min((t.ttft_s for t in timers if t.ttft_s is not None), default=None),
        "outpace.decode_s": max((t.decode_s for t in timers if t.ttft_s is not None), default=None),
        "outpace.cached_tokens": sum(tally.num_cached for tally in tallies) if parts else None,
        "outpace.draft_tokens": sum(tally.num_drafted for tally in tallies) if parts else None,
        "outpace.accepted_draft_tokens": sum(tally.num_accepted for tally in tallies) if parts else None,
    }
