"""Ends, refusals, aborts, pauses and slot reuse: the engine's promises besides its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server.core import FinishReason, SamplingParams, SpeculationParams
from server.spec.cost_table import CostGrid, CostTable
from tests.engine.tiny import VOCAB_SIZE, Answers, Scripted, engine, prompts, request, run, runner_of


def oracle(prompt: list[int], answer: list[int]) -> Scripted:
    """Always drafts what the target will say."""
    whole = [*prompt, *answer]
    return Scripted(lambda tokens, k: whole[len(tokens) : len(tokens) + k])


# -- ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("at", range(1, 8))
def test_a_stop_token_inside_the_accepted_window_ends_the_answer_there(
    model: Any, greedy: Any, at: int, ragged: bool
) -> None:
    prompt = prompts(1)[0]
    answer = greedy(prompt, 24)
    stop = answer[at]
    end = answer.index(stop) + 1
    core = engine(model, oracle(prompt, answer), 7, ragged=ragged)
    answers = run(core, [request("r", prompt, 24, stop_token_ids=[stop])])
    assert answers["r"] == answer[:end]
    assert answers.reasons == {"r": FinishReason.STOP}
    assert core.stats().num_emitted == end
    core.check_integrity()


@pytest.mark.parametrize("ignore", [True, False])
def test_end_of_sequence_ends_unless_it_is_ignored(model: Any, greedy: Any, ignore: bool) -> None:
    prompt = prompts(1)[0]
    answer = greedy(prompt, 24)
    eos = answer[5]
    core = engine(model, oracle(prompt, answer), 7, eos=[eos, 63])
    answers = run(core, [request("r", prompt, 24, ignore_eos=ignore)])
    assert answers["r"] == (answer if ignore else answer[: answer.index(eos) + 1])
    assert answers.reasons["r"] is (FinishReason.LENGTH if ignore else FinishReason.STOP)


def test_a_stop_token_counts_even_where_end_of_sequence_is_ignored(model: Any, greedy: Any) -> None:
    prompt = prompts(1)[0]
    stop = greedy(prompt, 24)[0]
    answers = run(engine(model, eos=[stop]), [request("r", prompt, 24, ignore_eos=True, stop_token_ids=[stop])])
    assert answers["r"] == [stop]
    assert answers.reasons["r"] is FinishReason.STOP


def test_a_stop_token_as_the_last_one_allowed_is_a_stop(model: Any, greedy: Any) -> None:
    prompt = prompts(1)[0]
    answer = greedy(prompt, 24)
    length = next(n for n in range(2, 24) if answer.index(answer[n - 1]) == n - 1)
    answers = run(engine(model), [request("r", prompt, length, stop_token_ids=[answer[length - 1]])])
    assert len(answers["r"]) == length
    assert answers.reasons["r"] is FinishReason.STOP


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("max_tokens", range(1, 11))
def test_max_tokens_is_exact(model: Any, greedy: Any, max_tokens: int, ragged: bool) -> None:
    prompt = prompts(1)[0]
    answer = greedy(prompt, 24)
    core = engine(model, oracle(prompt, answer), 7, ragged=ragged)
    answers = run(core, [request("r", prompt, max_tokens)])
    assert answers["r"] == answer[:max_tokens]
    assert answers.reasons["r"] is FinishReason.LENGTH


@pytest.mark.parametrize("ragged", [True, False])
def test_a_sequence_may_fill_context_and_pool_to_the_last_token(model: Any, greedy: Any, ragged: bool) -> None:
    prompt = prompts(1, low=20, high=21)[0]
    answer = greedy(prompt, 24)
    core = engine(model, oracle(prompt, answer), 7, max_model_len=44, num_blocks=12, ragged=ragged)
    assert run(core, [request("r", prompt, 24)])["r"] == answer


def test_a_prompt_of_one_token(model: Any, greedy: Any) -> None:
    assert run(engine(model, "suffix", 3), [request("r", [17], 12)])["r"] == greedy([17], 12)


# -- speculation switches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [True, False])
def test_a_request_bounds_or_switches_off_its_drafts(model: Any, greedy: Any, ragged: bool) -> None:
    prompt = prompts(1)[0]
    answer = greedy(prompt, 24)
    core = engine(model, oracle(prompt, answer), 5, ragged=ragged)
    wishes = {
        "off": SpeculationParams(enabled=False),
        "zero": SpeculationParams(max_draft_tokens=0),
        "two": SpeculationParams(max_draft_tokens=2),
        "free": SpeculationParams(),
        "more": SpeculationParams(max_draft_tokens=9),
    }
    answers = run(core, [request(name, prompt, 24, speculation=wish) for name, wish in wishes.items()])
    assert all(answers[name] == answer for name in wishes)
    most = {name: max(o.num_drafted for o in answers.outputs if o.request_id == name) for name in wishes}
    assert most == {"off": 0, "zero": 0, "two": 2, "free": 5, "more": 5}


def test_a_batch_that_may_not_draft_never_asks_the_drafter(model: Any) -> None:
    drafter = Scripted(lambda tokens, k: [3] * k)
    core = engine(model, drafter, 3)
    run(core, [request("r", prompts(1)[0], speculation=SpeculationParams(enabled=False))])
    assert drafter.calls["propose"] == 0


def dear_drafts(k: int) -> CostTable:
    """A draft costs a thousand steps: none ever pays, and no probe is affordable."""
    grid = CostGrid((1, 16), (0, k), (16,))
    return CostTable(grid, np.array([[[1.0], [1000.0]]] * 2), np.array([[0.0, 1000.0]] * 2))


def test_while_drafting_is_paused_the_drafter_does_not_run(model: Any, greedy: Any) -> None:
    """k = 0: it neither drafts nor reads prompts."""
    drafter = Scripted(lambda tokens, k: [3] * k)
    drafter.has_distribution = True  # so one k is chosen before anything is drafted
    core = engine(model, drafter, 3, costs=dear_drafts(3))
    core.step()
    run(core, [request("first", [5], 2)])
    assert core.stats().speculation_paused
    drafter.calls = dict.fromkeys(drafter.calls, 0)
    batch = prompts(3)
    answers = run(core, [request(f"r{i}", p) for i, p in enumerate(batch)])
    assert drafter.calls == {"prefill": 0, "propose": 0, "commit": 0}
    assert [answers[f"r{i}"] for i in range(3)] == [greedy(p, 24) for p in batch]


def test_drafts_are_counted_by_position(model: Any, greedy: Any) -> None:
    prompt = prompts(1)[0]
    answer = greedy(prompt, 24)
    whole = [*prompt, *answer]

    def first_right(tokens: list[int], k: int) -> list[int]:
        right = whole[len(tokens) : len(tokens) + k]
        return [t if i < 1 else (t + 1) % VOCAB_SIZE for i, t in enumerate(right)]

    core = engine(model, Scripted(first_right), 3)
    answers = run(core, [request("r", prompt, 24)])
    stats = core.stats()
    assert stats.accepted_per_position == [answers.num_accepted, 0, 0]
    assert stats.num_draft_steps == stats.drafted_per_position[0] == answers.num_accepted


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ([], {}, "empty"),
        ([5] * 100, {"max_tokens": 29}, "context of 128"),
        ([5] * 30, {"max_tokens": 60}, "KV cache of 76"),
        ([5, VOCAB_SIZE], {}, f"token id {VOCAB_SIZE} is out of range; use 0 to {VOCAB_SIZE - 1}"),
        ([-1], {}, "token id -1"),
        ([5], {"sampling": SamplingParams(logit_bias={64: 1.0})}, "token id 64"),
        ([5], {"max_tokens": 0}, "max_tokens: 0"),
        ([5], {"max_tokens": -3}, "max_tokens: -3"),
    ],
)
def test_what_can_not_run_is_refused_with_the_reason(
    model: Any, prompt: list[int], fields: dict[str, Any], message: str
) -> None:
    core = engine(model, num_blocks=20)
    output = core.submit(request("r", prompt, **{"max_tokens": 8, **fields}))
    assert output is not None
    assert output.request_id == "r"
    assert output.finish_reason is FinishReason.ERROR
    assert message in str(output.error)
    assert not core.has_work
    core.check_integrity()


def test_a_full_queue_and_a_double_id_are_refused(model: Any) -> None:
    core = engine(model, max_waiting=1, max_num_seqs=1)
    assert core.submit(request("a", [5])) is None
    double = core.submit(request("a", [5]))
    assert double is not None
    assert "'a' is in use" in str(double.error)
    assert core.submit(request("b", [5])) is None
    full = core.submit(request("c", [5]))
    assert full is not None
    assert "queue is full (1" in str(full.error), "one runs at the next step, one may wait"
    answers = run(core, [])
    assert set(answers) == {"a", "b"}


def test_generate_yields_refusals_too(model: Any) -> None:
    outputs = list(engine(model).generate([request("bad", []), request("good", [5], 3)]))
    assert outputs[0].finish_reason is FinishReason.ERROR
    assert len(Answers(outputs[1:])["good"]) == 3


# -- aborts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
def test_an_abort_frees_everything_at_once(model: Any, greedy: Any, num_steps: int) -> None:
    """Waiting, in the middle of the prompt, decoding."""
    drafter = Scripted(lambda tokens, k: tokens[:k])
    core = engine(model, drafter, 3, budget=6, max_num_seqs=2)
    batch = prompts(4, low=10, high=16)
    for i, prompt in enumerate(batch):
        core.submit(request(f"r{i}", prompt))
    for _ in range(num_steps):
        core.step()
    for i in (0, 1, 3):
        core.abort(f"r{i}")
        core.check_integrity()
    core.abort("nobody")
    answers = run(core, [])
    assert set(answers) == {"r2"}
    assert answers["r2"] == greedy(batch[2], 24)
    assert not drafter.tokens


def test_an_aborted_id_may_be_used_again(model: Any, greedy: Any) -> None:
    core = engine(model)
    prompt = prompts(1)[0]
    core.submit(request("r", prompt))
    core.step()
    core.abort("r")
    assert run(core, [request("r", prompt)])["r"] == greedy(prompt, 24)


# -- slots change hands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [True, False])
def test_a_slot_remembers_nothing_of_its_last_owner(model: Any, greedy: Any, ragged: bool) -> None:
    """A long, sampled, biased and penalised owner with a logprobs wish; then a short greedy one with drafts."""
    core = engine(model, "ngram", 5, max_num_seqs=1, ragged=ragged)
    bias = dict.fromkeys(range(30), 5.0)
    loud = SamplingParams(temperature=1.5, seed=1, logit_bias=bias, frequency_penalty=1.0, top_k=3, logprobs=4)
    run(core, [request("loud", prompts(1, low=40, high=41)[0], 60, sampling=loud)])
    assert not runner_of(core).block_tables.any()
    prompt = prompts(1, seed=4)[0]
    answers = run(core, [request("quiet", prompt)])
    assert answers["quiet"] == greedy(prompt, 24)
    assert all(o.logprobs is None for o in answers.outputs)
    weak = SamplingParams(temperature=0.0, logit_bias={3: 0.0})
    assert run(core, [request("weak", prompt, sampling=weak)])["weak"] == greedy(prompt, 24)


def test_host_and_device_agree_after_every_step(model: Any) -> None:
    core = engine(model, "suffix", 3, num_blocks=24, max_num_seqs=4, budget=7)
    for i, prompt in enumerate(prompts(8)):
        core.submit(request(f"r{i}", prompt))
    while core.has_work:
        core.step()
        state, tables = runner_of(core).state, runner_of(core).block_tables
        for seq in core.scheduler.running:
            assert state.num_tokens[seq.slot] == seq.num_tokens
            assert state.prompt_len[seq.slot] == seq.prompt_len
            assert state.history[seq.slot, : seq.num_tokens].tolist() == seq.token_ids
            have = int((tables[seq.slot] != 0).sum())
            assert tables[seq.slot, :have].tolist() == seq.blocks[:have]
            assert have * 4 >= seq.num_computed
        owned = {seq.slot for seq in core.scheduler.running}
        assert not any(tables[slot].any() for slot in range(4) if slot not in owned)
    assert core.stats().num_preemptions > 0


def test_rubbish_in_the_pool_never_shows(model: Any, other_model: Any, greedy: Any) -> None:
    """Places that were never written, or by somebody else, count for nothing; masked ones are read, so it is finite."""
    core = engine(model, "small-lm", 3, draft_model=other_model, num_blocks=40)
    for pool in [*runner_of(core).pools, *runner_of(core).drafter.pools]:  # type: ignore[union-attr]
        pool.normal_(std=30.0, generator=torch.Generator().manual_seed(1))
    batch = prompts(4)
    answers = run(core, [request(f"r{i}", p) for i, p in enumerate(batch)])
    assert [answers[f"r{i}"] for i in range(4)] == [greedy(p, 24) for p in batch]


def test_stats_tell_what_happened(model: Any) -> None:
    core = engine(model, "suffix", 3)
    batch = prompts(3)
    for i, prompt in enumerate(batch):
        core.submit(request(f"r{i}", prompt, 8))
    assert core.stats().num_waiting == 3
    core.step()
    assert (core.stats().num_running, core.stats().num_waiting) == (3, 0)
    assert core.stats().kv_blocks_used > 0
    run(core, [])
    stats = core.stats()
    assert stats.num_emitted == 24
    assert stats.num_prefill_tokens == sum(map(len, batch))
    assert stats.kv_blocks_total == 399
    assert stats.num_preemptions == 0
