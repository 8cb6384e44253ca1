"""What the scheduler does with blocks: preemption and recomputation, shared prefixes."""

from __future__ import annotations

from tests.engine.scheduling import drive, request, rows_of

# -- preemption --------------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    driver = drive(num_blocks=7, k=0, prefix_cache=False, budget=64, max_num_seqs=2)
    driver.submit(request("a", 8, 10), request("b", 8, 10), request("c", 2, 2))
    while driver.scheduler.counters.num_preemptions == 0:
        driver.step()
    assert [s.request.request_id for s in driver.scheduler.running] == ["a"]
    assert [s.request.request_id for s in driver.scheduler.waiting] == ["b", "c"]
    b = driver.scheduler.waiting.peek()
    assert (b.slot, b.blocks, b.num_computed, b.keys) == (-1, [], 0, [])
    assert b.num_emitted > 0, "what was emitted is computed again, not emitted again"
    driver.run()
    assert {name: len(tokens) for name, tokens in driver.emitted.items()} == {"a": 10, "b": 10, "c": 2}


def test_several_preempted_come_back_in_their_order() -> None:
    driver = drive(num_blocks=9, k=0, prefix_cache=False, budget=64, block_size=2, max_model_len=16, max_num_seqs=4)
    driver.submit(*(request(name, 2, 12) for name in "abcd"))
    order: list[list[str]] = []
    while driver.scheduler.has_work:
        driver.step()
        order.append([s.request.request_id for s in driver.scheduler.waiting])
    assert driver.scheduler.counters.num_preemptions >= 3
    assert all(names == sorted(names) for names in order)
    assert driver.finished == set("abcd")


def test_a_row_that_finds_no_block_behind_a_prompt_gives_itself_up() -> None:
    """The decoding sequence is the youngest and the only candidate: no rows are left, and the prompt goes on."""
    driver = drive(num_blocks=8, k=0, prefix_cache=False, budget=4, block_size=4, max_model_len=28)
    driver.submit(request("old", 20, 4), request("young", 2, 9))
    steps = 0
    while driver.scheduler.has_work:
        driver.step()
        steps += 1
        assert steps < 200
    assert driver.finished == {"old", "young"}


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    driver = drive(num_blocks=7, k=0, budget=64, max_num_seqs=2)
    driver.submit(request("a", 8, 10), request("b", 8, 10))
    while driver.scheduler.counters.num_preemptions == 0:
        driver.step()
    driver.run()
    assert len(driver.emitted["b"]) == 10
    # The recomputation of b is not a second cache hit of its prompt in the books.
    assert driver.scheduler.counters.num_cached_tokens == 0


# -- prefix cache ------------------------------------------------------------------------------------------


def test_a_block_aligned_prompt_hit_in_full_still_computes_one_block() -> None:
    driver = drive(k=0)
    prompt = list(range(50, 58))
    driver.submit(request("first", prompt, 2))
    driver.run()
    driver.submit(request("second", prompt, 2))
    driver.plans.clear()
    driver.run()
    assert rows_of(driver)[0] == ("prefill", 4, 4, 0)
    assert driver.scheduler.counters.num_cached_tokens == 4


def test_a_hit_of_all_but_the_last_token_goes_straight_to_verification() -> None:
    driver = drive(k=3)
    prompt = list(range(50, 59))
    driver.submit(request("first", prompt, 2))
    driver.run()
    driver.submit(request("second", prompt, 6))
    driver.plans.clear()
    driver.run()
    assert rows_of(driver)[0] == ("verify", 8, 1, 3)
    assert len(driver.emitted["second"]) == 6


def test_a_running_sequence_shares_its_prompt_blocks() -> None:
    driver = drive(k=0, budget=64)
    prompt = list(range(50, 62))
    driver.submit(request("first", prompt, 20))
    driver.step()
    driver.submit(request("second", [*prompt, 1, 2], 4))
    driver.step()
    first, second = driver.scheduler.running
    assert second.blocks[:3] == first.blocks[:3]
    assert [driver.scheduler.pool.refs(b) for b in first.blocks[:3]] == [2, 2, 2]
    assert second.num_cached == 12
    driver.abort("first")
    assert [driver.scheduler.pool.refs(b) for b in second.blocks[:3]] == [1, 1, 1]
    driver.run()


def test_a_turn_of_a_conversation_reuses_the_answer_before_it() -> None:
    driver = drive(k=3)
    driver.submit(request("turn", 8, 8))
    driver.run()
    history = [*request("turn", 8).prompt_ids, *driver.emitted["turn"], 7, 7]
    driver.submit(request("next", history, 2))
    driver.step()
    (seq,) = driver.scheduler.running
    # Of 16 tokens the last was emitted and never computed, so the block it fills is not there.
    assert seq.num_cached == 12


def test_rejected_drafts_never_enter_the_cache() -> None:
    driver = drive(k=7, accept=lambda n: 0)
    driver.submit(request("a", 4, 3))
    driver.run()
    assert len(driver.scheduler.cache) == 1


def test_switched_off_nothing_is_shared() -> None:
    driver = drive(prefix_cache=False)
    for name in "ab":
        driver.submit(request(name, list(range(50, 62)), 2))
        driver.run()
    assert driver.scheduler.counters.num_cached_tokens == 0
