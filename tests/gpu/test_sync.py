"""Nothing in a steady step waits for the device, but for the event of the step that is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from server.core import SamplingParams
from server.engine.core import EngineCore
from tests.engine.tiny import request
from tests.gpu.small import DRAFTERS, MIXED, Engines, prompts

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*ynchronization debug mode"),  # torch announces it as a prototype
]

NUM_ROWS = 3
NUM_STEPS = 24
"""Enough for plain decoding to fill a block and take the next one."""
SLEEP_CYCLES = 120_000_000
"""About 0.06 s: many times what the host needs for a step."""
KINDS: dict[str, list[SamplingParams]] = {
    "greedy": [MIXED[0]] * NUM_ROWS,
    "sampled": [MIXED[1]] * NUM_ROWS,
    "filtered": [MIXED[2]] * NUM_ROWS,
    "adjusted": [MIXED[3]] * NUM_ROWS,
    "full": [MIXED[4]] * NUM_ROWS,
    "mixed": [MIXED[0], MIXED[2], MIXED[3]],
}
_names = itertools.count()


@contextmanager
def nothing_synchronises() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def steady(core: EngineCore, sampling: list[SamplingParams]) -> Iterator[None]:
    """All rows decode, admission is over and the first steps are done."""
    names = [f"row-{next(_names)}" for _ in sampling]
    for name, prompt, params in zip(names, prompts(len(names), seed=5), sampling, strict=True):
        assert core.submit(request(name, prompt, 700, sampling=params)) is None
    silent = set(names)
    while silent:
        silent -= {output.request_id for output in core.step()}
    for _ in range(8):
        core.step()
    try:
        yield
    finally:
        for name in names:
            core.abort(name)
        while core.has_work:
            core.step()


def test_the_guard_notices_a_wait() -> None:
    value = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), nothing_synchronises():
        value.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_steady_step_waits_for_one_event(
    engines: Engines, drafter: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = engines.get(drafter)
    waits: list[Any] = []
    wait = torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        waits.append(event)
        wait(event)

    def forbidden(*_: object) -> None:
        raise AssertionError("a step synchronises")

    with steady(core, KINDS[kind]), monkeypatch.context() as patched:
        patched.setattr(torch.cuda.Event, "synchronize", counted)
        patched.setattr(torch.cuda, "synchronize", forbidden)
        patched.setattr(torch.cuda.Stream, "synchronize", forbidden)
        with nothing_synchronises():
            outputs = [core.step() for _ in range(NUM_STEPS)]
    assert [len(step) for step in outputs] == [NUM_ROWS] * NUM_STEPS
    assert len(waits) == NUM_STEPS
    assert core.stats().num_graph_misses == 0


@pytest.mark.parametrize("drafter", ["small-lm", "eagle3"])
def test_drafting_again_waits_for_nothing(engines: Engines, drafter: str) -> None:
    """What pauses have left behind is computed without looking at the device."""
    core = engines.get(drafter)
    runner: Any = core.runner
    resume = runner.drafter.resume
    with steady(core, KINDS["greedy"]):
        late = list(core.scheduler.running)
        slots, known = [seq.slot for seq in late], [seq.token_ids for seq in late]
        resume(slots, known, [0] * len(late))  # kernels of this shape are compiled
        with nothing_synchronises():
            resume(slots, known, [0] * len(late))
        torch.cuda.synchronize()
        busy = torch.cuda.Event()
        torch.cuda._sleep(SLEEP_CYCLES)
        busy.record()
        resume(slots, known, [0] * len(late))
        assert not busy.query(), "it waited for work that was queued before it"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_host_is_done_while_the_device_is_still_busy(engines: Engines, drafter: str, kind: str) -> None:
    """Whatever would wait, torch's debug mode knows of it or not: the step returns before the device gets to it."""
    core = engines.get(drafter)
    with steady(core, KINDS[kind]):
        torch.cuda.synchronize()
        busy = torch.cuda.Event()
        torch.cuda._sleep(SLEEP_CYCLES)
        busy.record()
        outputs = core.step()
        assert not busy.query(), "the step waited for work that was queued before it"
    assert len(outputs) == NUM_ROWS


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_admission_waits_for_nothing(engines: Engines, drafter: str) -> None:
    core = engines.get(drafter)
    for attempt in range(2):  # the first one may still make what is kept
        names = [f"row-{next(_names)}" for _ in range(NUM_ROWS)]
        for name, prompt, params in zip(names, prompts(NUM_ROWS, seed=6), KINDS["mixed"], strict=True):
            assert core.submit(request(name, prompt, 20, sampling=params)) is None
        assert core.scheduler.schedule(core.speculation.num_draft_tokens) is not None
        assert len(core.scheduler.admitted) == NUM_ROWS
        torch.cuda.synchronize()
        busy = torch.cuda.Event()
        if attempt == 0:
            core.runner.admit(core.scheduler.admitted)
        else:
            torch.cuda._sleep(SLEEP_CYCLES)
            busy.record()
            with nothing_synchronises():
                core.runner.admit(core.scheduler.admitted)
            assert not busy.query(), "admission waited for work that was queued before it"
        core.scheduler.admitted.clear()
        for name in names:
            core.abort(name)
    core.check_integrity()
