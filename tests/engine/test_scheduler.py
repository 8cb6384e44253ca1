"""Admission, prompt chunks, draft limits, preemption, and that every request ends."""

from __future__ import annotations

import pytest

from server.core import Phase
from server.engine.scheduler import Scheduler
from tests.engine.scheduling import drive, limits, request, rows_of

# -- admission and phases ----------------------------------------------------------------------------------


def test_first_come_first_served_and_no_more_than_the_slots() -> None:
    driver = drive(max_num_seqs=2, budget=64)
    driver.submit(*(request(name) for name in "abc"))
    driver.step()
    assert [s.request.request_id for s in driver.scheduler.running] == ["a", "b"]
    assert [s.request.request_id for s in driver.scheduler.waiting] == ["c"]
    driver.run()
    assert driver.finished == {"a", "b", "c"}


def test_a_request_that_does_not_fit_yet_is_not_overtaken() -> None:
    driver = drive(num_blocks=9, budget=64, prefix_cache=False)
    driver.submit(request("a", 20, 4), request("large", 20, 4), request("small", 2, 1))
    driver.step()
    assert [s.request.request_id for s in driver.scheduler.waiting] == ["large", "small"]
    driver.run()
    assert len(driver.finished) == 3


def test_a_prompt_runs_in_chunks_of_the_budget() -> None:
    driver = drive(budget=8, k=0)
    driver.submit(request("a", 19, 2))
    driver.run()
    assert rows_of(driver) == [("prefill", 0, 8, 0), ("prefill", 8, 8, 0), ("prefill", 16, 3, 0), ("verify", 19, 1, 0)]


def test_the_budget_is_shared_in_order() -> None:
    driver = drive(budget=8)
    driver.submit(request("a", 5), request("b", 6), request("c", 4))
    plan = driver.step()
    assert plan is not None
    assert [(r.start, r.num_tokens, r.samples) for r in plan.rows] == [(0, 5, True), (0, 3, False)]


def test_prompts_and_verify_steps_alternate() -> None:
    driver = drive(budget=4, k=0)
    driver.submit(request("a", 4, 30))
    driver.step()
    driver.submit(request("b", 20, 2))
    phases = []
    for _ in range(8):
        plan = driver.step()
        assert plan is not None
        phases.append(plan.phase)
    assert phases[:8] == [Phase.VERIFY, Phase.PREFILL] * 4


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_prompt_chunk_of_k_plus_one_tokens_is_still_a_prefill(k: int) -> None:
    driver = drive(budget=1 + k, k=k)
    driver.submit(request("a", 3 * (1 + k), 10))
    for i in range(3):
        plan = driver.step()
        assert plan is not None
        assert plan.phase is Phase.PREFILL
        assert (plan.rows[0].num_tokens, plan.rows[0].samples, plan.rows[0].max_drafts) == (1 + k, i == 2, 0)


def test_a_single_token_left_of_the_prompt_is_a_verify_row() -> None:
    """It is one token that samples, like any other; drafts may follow it."""
    driver = drive(budget=8, k=2)
    driver.submit(request("a", 9), request("b", 1))
    driver.run()
    assert rows_of(driver)[0] == ("prefill", 0, 8, 0) or rows_of(driver)[0] == ("verify", 0, 1, 2)
    assert driver.finished == {"a", "b"}


def test_prompts_in_progress_do_not_count_as_decoding() -> None:
    driver = drive(budget=4)
    driver.submit(request("a", 3, 20))
    driver.step()
    driver.submit(request("b", 20, 2))
    assert driver.scheduler.num_decoding() == 1
    driver.step()
    driver.step()
    assert len(driver.scheduler.running) == 2
    assert driver.scheduler.num_decoding() == 1


def test_nothing_to_do_is_no_plan() -> None:
    scheduler = Scheduler(limits())
    assert not scheduler.has_work
    assert scheduler.schedule(lambda rows, eligible: 3) is None
    assert scheduler.num_decoding() == 0


# -- drafts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_tokens", "enabled", "own", "k", "expected"),
    [
        (9, True, None, 3, 3),
        (9, True, 2, 3, 2),
        (9, True, 5, 3, 3),
        (9, True, 0, 3, 0),
        (9, False, None, 3, 0),
        (9, False, 2, 3, 0),
        (9, True, None, 0, 0),
        (3, True, None, 3, 1),  # one emitted by the prompt, two left: a draft and the bonus token
        (2, True, None, 3, 0),
    ],
)
def test_most_drafts_of_a_row(max_tokens: int, enabled: bool, own: int | None, k: int, expected: int) -> None:
    driver = drive(k=k)
    driver.submit(request("a", 5, max_tokens, enabled, own))
    driver.step()
    plan = driver.step()
    assert plan is not None
    assert plan.phase is Phase.VERIFY
    assert plan.rows[0].max_drafts == expected


def test_accepted_drafts_end_exactly_at_max_tokens() -> None:
    driver = drive(k=7)
    driver.submit(*(request(f"r{n}", 5, n) for n in range(1, 13)))
    driver.run()
    assert {name: len(tokens) for name, tokens in driver.emitted.items()} == {f"r{n}": n for n in range(1, 13)}


def test_drafts_never_preempt() -> None:
    """Five blocks of four, two rows of two blocks: drafts get the one that is left, then there are none."""
    driver = drive(num_blocks=6, k=7, max_model_len=16, prefix_cache=False, budget=64)
    driver.submit(request("a", 7, 6), request("b", 7, 6))
    driver.scheduler.schedule(lambda rows, eligible: 0)
    driver.host_events()
    for seq in driver.scheduler.running:
        driver.scheduler.commit(seq, 7, [1])
    plan = driver.step()
    assert plan is not None
    assert [row.max_drafts for row in plan.rows] == [4, 0]
    assert driver.scheduler.counters.num_preemptions == 0


def test_drafts_shrink_to_the_room_that_is_left() -> None:
    driver = drive(num_blocks=3, k=7, max_model_len=16, accept=lambda n: 0)
    driver.submit(request("a", 5, 3))
    driver.submit(request("b", 4, 4))
    plans = []
    while driver.scheduler.has_work:
        plan = driver.step()
        assert plan is not None
        plans.append(plan)
    assert driver.finished == {"a", "b"}
    assert max(row.max_drafts for plan in plans for row in plan.rows) == 2


# -- refusals and ends -------------------------------------------------------------------------------------


def test_refusals_name_the_numbers() -> None:
    scheduler = Scheduler(limits(max_model_len=64, num_blocks=9))
    assert scheduler.refusal(request("a", 24, 8)) is None
    assert "empty" in str(scheduler.refusal(request("a", [], 8)))
    too_long = str(scheduler.refusal(request("a", 60, 5)))
    assert all(part in too_long for part in ("60 tokens", "(5)", "65", "context of 64"))
    too_large = str(scheduler.refusal(request("a", 30, 3)))
    assert all(part in too_large for part in ("30 tokens", "(3)", "33", "KV cache of 32"))
    scheduler.submit(request("a", 4, 4))
    assert "'a' is in use" in str(scheduler.refusal(request("a", 4, 4)))


def test_a_request_as_large_as_the_pool_runs_through() -> None:
    driver = drive(num_blocks=9, k=7, max_model_len=64)
    driver.submit(request("a", 20, 12))
    driver.run()
    assert len(driver.emitted["a"]) == 12


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_an_end_in_any_state_frees_everything(num_steps: int) -> None:
    """Waiting, in the middle of the prompt, and decoding."""
    driver = drive(budget=4, max_num_seqs=2)
    driver.submit(*(request(name, 10, 20) for name in "abc"))
    for _ in range(num_steps):
        driver.step()
    for name in "abc":
        driver.abort(name)
    driver.scheduler.check_integrity()
    assert driver.scheduler.pool.num_used == 0
    assert driver.scheduler.slots.num_free == 2
    assert not driver.scheduler.has_work
    driver.submit(request("a", 10, 2))  # the id is free again
    driver.run()


def test_integrity_finds_sequences_that_lost_their_place() -> None:
    driver = drive()
    driver.submit(request("a"))
    scheduler = driver.scheduler
    seq = scheduler.waiting.peek()
    seq.blocks.append(3)
    with pytest.raises(AssertionError, match="a waits but owns"):
        scheduler.check_integrity()
    seq.blocks.clear()
    scheduler.waiting.remove(seq)
    with pytest.raises(AssertionError, match="neither waiting, running nor held"):
        scheduler.check_integrity()
