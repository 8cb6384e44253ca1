"""While requests wait: who started, how much waits, whose turn it is, and what was cached."""

from __future__ import annotations

from typing import Any

import pytest

from server.core import FinishReason
from server.engine.core import EngineCore
from tests.engine.tiny import engine, prompts, request, run


def watched(core: EngineCore) -> list[list[str]]:
    """Fills as requests start."""
    started: list[list[str]] = []
    core.on_started = started.append
    return started


# -- who started -------------------------------------------------------------------------------------------


def test_each_request_starts_once_when_it_first_holds_a_slot(model: Any) -> None:
    core = engine(model, max_num_seqs=2, budget=64)
    started = watched(core)
    for i, prompt in enumerate(prompts(4, low=5, high=9)):
        core.submit(request(f"r{i}", prompt, 6))
    assert started == []
    core.step()
    assert started == [["r0", "r1"]]
    core.step()
    assert started == [["r0", "r1"]]
    run(core, [])
    assert [name for names in started for name in names] == ["r0", "r1", "r2", "r3"]
    assert all(started), "no empty calls"


def test_coming_back_is_no_start(model: Any) -> None:
    core = engine(model, "suffix", 3, num_blocks=23, max_num_seqs=8)
    started = watched(core)
    for i, prompt in enumerate(prompts(10)):
        core.submit(request(f"r{i}", prompt))
    core.step()
    core.hold("r0")
    core.resume("r0")
    run(core, [])
    assert core.stats().num_preemptions > 0
    names = [name for names in started for name in names]
    assert sorted(names) == sorted(set(names)) == [f"r{i}" for i in range(10)]


def test_starts_are_told_before_the_step_runs(model: Any) -> None:
    """What brings the engine down is then known to have been touched."""

    class Falling:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def forward(self, *args: Any) -> Any:
            raise RuntimeError("the device is gone")

    core = engine(Falling())
    started = watched(core)
    core.submit(request("r", [5, 6]))
    with pytest.raises(RuntimeError, match="device is gone"):
        core.step()
    assert started == [["r"]]


# -- how much waits ----------------------------------------------------------------------------------------


def test_waiting_prompts_are_counted_and_bounded_in_tokens(model: Any) -> None:
    core = engine(model, max_num_seqs=1, max_waiting_tokens=25)
    assert core.submit(request("first", [5] * 40, 4)) is None, "a slot is free for it"
    refused = core.submit(request("a", [5] * 10, 4))
    assert refused is not None
    assert refused.finish_reason is FinishReason.ERROR
    assert refused.error == "the queue is full (prompts of 40 tokens wait, at most 25 may)"
    core.step()
    assert core.stats().num_waiting_tokens == 0
    for name, length in (("b", 10), ("c", 15)):
        assert core.submit(request(name, [6] * length, 4)) is None
    assert core.stats().num_waiting_tokens == 25
    assert core.submit(request("d", [7], 4)) is not None
    core.abort("b")
    assert core.stats().num_waiting_tokens == 15
    assert core.submit(request("e", [7] * 10, 4)) is None
    assert set(run(core, [])) == {"first", "c", "e"}


def test_preempted_prompts_wait_again(model: Any) -> None:
    core = engine(model)
    prompt = prompts(1)[0]
    core.submit(request("r", prompt))
    core.step()
    core.scheduler.preempt(core.scheduler.by_id["r"])
    assert core.stats().num_waiting_tokens == len(prompt)
    run(core, [])


# -- whose turn it is --------------------------------------------------------------------------------------


def test_a_flooding_tenant_does_not_keep_another_waiting(model: Any) -> None:
    core = engine(model, "suffix", 3, max_num_seqs=2)
    started = watched(core)
    for i, prompt in enumerate(prompts(20, low=8, high=9)):
        core.submit(request(f"flood{i}", prompt, 8, tenant="flood"))
    for _ in range(3):
        core.step()
    for i, prompt in enumerate(prompts(4, seed=5, low=8, high=9)):
        core.submit(request(f"meek{i}", prompt, 8, tenant="meek"))
    answers = run(core, [])
    assert len(answers) == 24
    order = [name for names in started for name in names]
    assert order.index("meek0") <= 4
    assert order.index("meek3") <= 12


def test_emitted_and_uncached_prompt_tokens_are_charged_once(model: Any) -> None:
    core = engine(model, "suffix", 3, num_blocks=23, max_num_seqs=8)
    batch = prompts(10)
    core.submit(request("waits", [5], 1, tenant="other", priority=9))  # so that the books are kept
    for i, prompt in enumerate(batch):
        core.submit(request(f"r{i}", prompt, tenant="t"))
    run(core, [])
    stats = core.stats()
    assert stats.num_preemptions > 0
    served = core.scheduler.waiting._priorities[0].served["t"]
    assert served == sum(map(len, batch)) + 10 * 24 - stats.num_cached_tokens


def test_urgent_requests_overtake(model: Any) -> None:
    core = engine(model, max_num_seqs=1)
    started = watched(core)
    for name, priority in (("a", 0), ("late", 5), ("b", 0), ("urgent", -1)):
        core.submit(request(name, [5, 6], 3, priority=priority))
    run(core, [])
    assert [name for names in started for name in names] == ["urgent", "a", "b", "late"]


# -- what was cached ---------------------------------------------------------------------------------------


def test_a_prompt_that_is_interrupted_is_counted_as_cached_once(model: Any) -> None:
    """What it finds when it comes back it computed itself."""
    core = engine(model, budget=8)
    first = prompts(1, low=40, high=41)[0]
    run(core, [request("first", first, 4)])
    longer = [*first, *prompts(1, seed=3, low=30, high=31)[0]]
    core.submit(request("r", longer, 4))
    core.step()
    assert core.stats().num_cached_tokens == 40
    core.scheduler.preempt(core.scheduler.by_id["r"])
    core.step()
    core.hold("r")
    core.resume("r")
    core.step()
    answers = run(core, [])
    assert [o.num_cached for o in answers.outputs if o.num_cached is not None] == [40]
    assert core.stats().num_cached_tokens == 40
