"""Background requests: they run while nobody else does, and stand aside at once."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from server.core import FinishReason, Request, SpeculationParams, StepPlan
from server.engine.core import MAX_BACKGROUND
from server.engine.scheduler import BACKGROUND_TOKENS, Scheduler
from server.engine.sequence import Sequence
from server.models.base import TargetModel
from tests.engine.scheduling import Accept, Driver, drive, limits, request
from tests.engine.tiny import engine, prompts
from tests.engine.tiny import request as real


def behind(name: str, prompt: int | list[int] = 5, max_tokens: int = 8) -> Request:
    return replace(request(name, prompt, max_tokens, enabled=False), background=True)


class Watched(Driver):
    """Notes the names of every plan's rows."""

    def __init__(self, accept: Accept = lambda n: 0, **sizes: Any) -> None:
        super().__init__(Scheduler(limits(**sizes)), accept=accept)
        self.names: list[list[str]] = []

    def check(self, plan: StepPlan, sequences: list[Sequence]) -> None:
        super().check(plan, sequences)
        self.names.append([seq.request.request_id for seq in sequences])


def test_it_runs_while_nobody_else_does() -> None:
    driver = drive()
    driver.submit(behind("copy"))
    driver.run()
    assert driver.finished == {"copy"}
    assert len(driver.emitted["copy"]) == 8


def test_it_is_not_admitted_while_users_run_or_wait() -> None:
    driver = Watched(max_num_seqs=1)
    driver.submit(behind("copy"), request("first"), request("second"))
    driver.run()
    names = [name for plan in driver.names for name in plan]
    assert names.index("copy") > max(i for i, name in enumerate(names) if name != "copy")


def test_a_user_gets_the_very_next_step_and_the_same_steps_as_alone() -> None:
    alone = Watched()
    alone.submit(request("user", max_tokens=4))
    alone.run()
    driver = Watched()
    driver.submit(behind("copy", max_tokens=20))
    for _ in range(4):
        driver.step()
    before = len(driver.plans)
    driver.submit(request("user", max_tokens=4))
    driver.run()
    steps = driver.plans[before : before + len(alone.plans)]
    assert [(p.phase, p.rows[0].num_tokens, len(p.rows)) for p in steps] == [
        (p.phase, p.rows[0].num_tokens, len(p.rows)) for p in alone.plans
    ]
    assert driver.names[before : before + len(alone.plans)] == alone.names
    assert driver.names[-1] == ["copy"], "it goes on afterwards"
    assert len(driver.emitted["copy"]) == 20
    assert driver.scheduler.counters.num_preemptions == 0


def test_it_gives_its_slot_to_a_user() -> None:
    driver = Watched(max_num_seqs=1)
    driver.submit(behind("copy", max_tokens=20))
    driver.step()
    driver.submit(request("user"))
    driver.step()
    assert driver.names[-1] == ["user"]
    assert [seq.request.request_id for seq in driver.scheduler.background] == ["copy"]
    driver.run()
    assert driver.finished == {"user", "copy"}


def test_it_gives_its_blocks_to_a_user_before_any_other_user_does() -> None:
    driver = Watched(num_blocks=9, max_num_seqs=3, prefix_cache=False)  # 8 blocks of 4 tokens
    driver.submit(behind("copy", prompt=8, max_tokens=8))
    for _ in range(3):
        driver.step()
    assert [seq.request.request_id for seq in driver.scheduler.running] == ["copy"]
    driver.submit(request("a", prompt=6, max_tokens=10), request("b", prompt=6, max_tokens=10))
    while {"a", "b"} - driver.finished:
        driver.step()
        assert driver.names[-1] != ["copy"] or {"a", "b"} <= driver.finished
    assert driver.scheduler.counters.num_preemptions == 0, "no user was preempted for it"
    driver.run()
    assert driver.finished == {"a", "b", "copy"}


def test_a_user_does_not_wait_for_a_prompt_that_stands_still() -> None:
    prompt = list(range(100, 130))
    driver = Watched()
    driver.submit(behind("copy", prompt))
    driver.step()
    driver.submit(request("user", prompt))
    driver.step()
    assert driver.names[-1] == ["user"]
    driver.run()


def test_what_it_computes_does_not_enter_the_prefix_cache() -> None:
    prompt = list(range(100, 120))
    driver = drive()
    driver.submit(behind("copy", prompt))
    driver.run()
    driver.submit(request("user", prompt))
    driver.run()
    assert driver.scheduler.counters.num_cached_tokens == 0
    driver.submit(request("again", prompt))
    driver.run()
    assert driver.scheduler.counters.num_cached_tokens == 16


@pytest.mark.parametrize("seed", range(20))
def test_any_mixture_ends_and_users_go_first(seed: int) -> None:
    rng = random.Random(seed)
    driver = Watched(num_blocks=17, max_num_seqs=rng.choice((1, 3)), accept=lambda n: rng.randint(0, n))
    copies: set[str] = set()
    for number in range(24):
        name = f"r{number}"
        make = behind if rng.random() < 0.5 else request
        if make is behind:
            copies.add(name)
        driver.submit(make(name, rng.randint(1, 20), rng.randint(1, 16)))
        for _ in range(rng.randint(0, 5)):
            users = {n for n in driver.scheduler.by_id if n not in copies}
            before = len(driver.plans)
            driver.step()
            if users and len(driver.plans) > before:
                assert not copies & set(driver.names[-1]), "a copy had a row while a user was there"
    driver.run()
    assert len(driver.finished) == 24


def test_its_queue_is_bounded_and_not_the_users(model: TargetModel) -> None:
    core = engine(model, max_num_seqs=1, max_waiting=1)
    for number in range(MAX_BACKGROUND):
        assert core.submit(replace(real(f"copy-{number}", [5, 6]), background=True)) is None
    refused = core.submit(replace(real("one-more", [5, 6]), background=True))
    assert refused is not None and refused.finish_reason is FinishReason.ERROR
    assert "background queue is full" in (refused.error or "")
    core.step()  # one of them holds the only slot
    assert (core.stats().num_running, core.stats().num_waiting) == (0, 0)
    assert core.stats().num_background == MAX_BACKGROUND
    core.hold("copy-0")
    assert (core.stats().num_held, core.stats().num_background) == (0, MAX_BACKGROUND)
    core.resume("copy-0")
    assert core.submit(real("user-1", [5, 6])) is None
    assert core.submit(real("user-2", [5, 6])) is None
    assert core.submit(real("user-3", [5, 6])) is not None, "one runs, one waits"


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_tokens_are_those_of_a_run_alone_however_often_it_stands_aside(
    model: TargetModel, overlapped: bool, drafter: str
) -> None:
    wanted = {}
    for number, prompt in enumerate(prompts(6)):
        alone = engine(model)
        wanted[f"r{number}"] = [t for o in alone.generate([real(f"r{number}", prompt)]) for t in o.token_ids]
    core = engine(model, drafter, max_num_seqs=2, num_blocks=24, overlapped=overlapped)
    found: dict[str, list[int]] = {name: [] for name in wanted}
    ended = []
    for number, prompt in enumerate(prompts(6)):
        core.submit(replace(real(f"r{number}", prompt), background=number % 2 == 0))
        for _ in range(3):
            for output in core.step():
                found[output.request_id] += output.token_ids
                ended += [output.request_id] if output.finish_reason else []
    while core.has_work:
        for output in core.step():
            found[output.request_id] += output.token_ids
            ended += [output.request_id] if output.finish_reason else []
    core.check_integrity()
    assert found == wanted
    assert sorted(ended) == sorted(wanted)


def test_its_prompts_are_read_in_small_pieces() -> None:
    driver = Watched(budget=256, max_model_len=256, num_blocks=100)
    driver.submit(behind("copy", prompt=200))
    driver.step()
    assert driver.plans[0].rows[0].num_tokens == BACKGROUND_TOKENS
    driver.submit(request("user", prompt=200))
    driver.step()
    assert (driver.names[-1], driver.plans[-1].rows[0].num_tokens) == (["user"], 200)
    driver.run()


def test_copies_without_drafts_say_nothing_of_drafting(model: TargetModel) -> None:
    core = engine(model, "ngram")
    alone = replace(real("copy", [5, 6, 7]), background=True, speculation=SpeculationParams(enabled=False))
    assert sum(len(output.token_ids) for output in core.generate([alone])) == 24
    assert (core.speculation._context, core.stats().num_emitted, core.stats().num_prefill_tokens) == (1.0, 0, 0)
    list(core.generate([real("user", [5, 6, 7])]))
    assert core.speculation._context > 1.0
    assert core.stats().num_emitted == 24
