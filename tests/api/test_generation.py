"""A client request's choices in the engine: one failure ends all, whoever leaves leaves nothing behind."""

from __future__ import annotations

import pytest

from server.api.choice_text import ChoiceText, Delta
from server.api.errors import ApiError
from server.api.generation import Generation, Part
from server.core import Request
from server.engine.errors import EngineUnavailable
from server.telemetry.metrics import Metrics
from tests.api.fakes import ByteText, FakeEngine, Script, endless, failing, steps


class Case:
    """A generation of `n` choices on a scripted engine; `deltas` is what it emitted."""

    def __init__(self, script: Script, n: int = 1, stop: tuple[str, ...] = ()) -> None:
        self.engine = FakeEngine(script)
        self.engine.ready = True
        self.metrics = Metrics("1")
        self.deltas: list[Delta] = []
        requests = [Request(f"r{i}", [1], choice=i) for i in range(n)]
        timer = self.metrics.of().choice_timer
        parts = [Part(r, ChoiceText(i, r, ByteText(), stop), timer(0.0)) for i, r in enumerate(requests)]
        self.generation = Generation(self.engine, parts, self.deltas.append)

    def ended(self, reason: str) -> float:
        value = self.metrics.registry.get_sample_value(
            "outpace_requests_total", {"arm": "control", "finish_reason": reason}
        )
        assert value is not None
        return value


async def test_all_choices_end() -> None:
    case = Case(steps("ab", "c"), n=3)
    case.generation.start()
    await case.generation.wait()
    for index in range(3):
        assert "".join(delta.text for delta in case.deltas if delta.index == index) == "abc"
    assert case.ended("stop") == 3
    await case.engine.until(lambda: not case.engine.active)
    assert not case.engine.aborted


async def test_a_stop_string_ends_the_request_in_the_engine() -> None:
    case = Case(endless, stop=("xxx",))
    case.generation.start()
    await case.generation.wait()
    await case.engine.until(lambda: not case.engine.active)
    assert case.engine.aborted == ["r0"]
    assert case.ended("stop") == 1


async def test_one_failure_ends_all_choices() -> None:
    def script(request: Request) -> object:
        return failing("broken", "a")(request) if request.choice == 1 else endless(request)

    case = Case(script, n=3)  # type: ignore[arg-type]
    case.generation.start()
    with pytest.raises(ApiError, match="broken"):
        await case.generation.wait()
    await case.engine.until(lambda: not case.engine.active)
    assert sorted(case.engine.aborted) == ["r0", "r2"]
    assert case.ended("error") == 3


async def test_an_engine_that_dies_fails_the_request() -> None:
    case = Case(endless)
    case.generation.start()
    case.engine.die("killed")
    with pytest.raises(EngineUnavailable, match="killed"):
        await case.generation.wait()
    case.generation.close()
    assert case.ended("error") == 1


async def test_an_error_in_a_listener_is_this_requests_own() -> None:
    case = Case(endless)

    def broken(delta: Delta) -> None:
        raise KeyError("a bug")

    case.generation._emit = broken
    case.generation.start()
    with pytest.raises(ApiError) as caught:
        await case.generation.wait()
    assert caught.value.status == 500
    await case.engine.until(lambda: not case.engine.active)


async def test_closing_aborts_what_is_left_and_a_second_time_does_nothing() -> None:
    case = Case(endless, n=2)
    case.generation.start()
    case.generation.close()
    case.generation.close()
    await case.engine.until(lambda: not case.engine.active)
    assert case.ended("abort") == 2


async def test_hold_reaches_open_requests_only_and_resume_only_after_hold() -> None:
    case = Case(endless, n=2)
    case.generation.start()
    case.generation.resume()
    case.generation.hold()
    assert case.engine.held == {"r0", "r1"}
    case.generation.resume()
    assert not case.engine.held
    case.generation.close()
    case.generation.hold()
    assert not case.engine.held
