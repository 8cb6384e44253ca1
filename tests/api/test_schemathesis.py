"""schemathesis against the OpenAPI document: a real server on loopback, in a thread, before a scripted engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.api.app import create_app
from server.api.arm import Arm
from server.api.arms import Arms
from server.api.openapi import document
from server.api.state import ServerState
from server.config import CONTROL, EngineConfig, ServerConfig
from server.telemetry.metrics import Metrics
from tests.api.fakes import ByteText, FakeEngine

SCHEMA = schemathesis.openapi.from_dict(document("1.2.3"))
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations() if isinstance(result, Ok)]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
NUM_EXAMPLES = {"post": 150, "get": 5}


class _Served:
    """A server on a thread of its own: schemathesis is no friend of event loops."""

    def __init__(self) -> None:
        self.url = ""
        self.engine: FakeEngine | None = None
        self.state: ServerState | None = None

    def wait_idle(self) -> None:
        """What an answer leaves behind ends a moment after its last byte."""
        assert self.engine is not None and self.state is not None
        deadline = time.monotonic() + 5
        while (self.state.num_in_flight or self.engine.active) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.state.num_in_flight
        assert not self.engine.active

    async def run(self, started: threading.Event, stop: asyncio.Event) -> None:
        self.engine = FakeEngine()
        config = ServerConfig(engine=EngineConfig(model="fake-dir"), port=0)
        metrics = Metrics("1.2.3")
        arm = Arm(CONTROL, config.engine, self.engine, "fake", metrics.clock, text=ByteText())
        self.state = ServerState(config, Arms([arm]), metrics, "1.2.3")
        await self.engine.wait_ready()
        runner = web.AppRunner(create_app(self.state), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await stop.wait()
        await runner.cleanup()


@contextmanager
def _serving() -> Iterator[_Served]:
    served, started = _Served(), threading.Event()
    control: dict[str, Any] = {}

    async def main() -> None:
        control["loop"], control["stop"] = asyncio.get_running_loop(), asyncio.Event()
        await served.run(started, control["stop"])

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield served
    finally:
        control["loop"].call_soon_threadsafe(control["stop"].set)
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[_Served]:
    with _serving() as served:
        yield served


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_what_the_document_says_is_true(served: _Served, operation: Any, mode: GenerationMode) -> None:
    """Requests that the document allows, and requests that it does not, which must be refused."""
    if mode is GenerationMode.NEGATIVE and operation.method != "post":
        pytest.skip("there is nothing to get wrong")
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
    with requests.Session() as session:

        @settings(
            max_examples=NUM_EXAMPLES[operation.method],
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            response = case.call(base_url=served.url, session=session)
            case.validate_response(response, checks=checks)

        check()
    served.wait_idle()
