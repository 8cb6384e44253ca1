"""A prompt's own log-probabilities: a plain log-softmax, the same bits however the prompt was run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.core import FinishReason, Request, SamplingParams, StepOutput, TokenLogprobs
from server.engine import scheduler
from server.engine.core import EngineCore
from server.engine.limits import Limits
from tests.engine.tiny import engine, prompts, request, run

NUM_TOP = 3


def batch(num_top: int = NUM_TOP, max_tokens: int = 6) -> list[Request]:
    """Every other request wants them; one prompt is a single token, two begin alike."""
    made = [*prompts(5, seed=2, low=6, high=40), [17]]
    made.append([*made[0], 5, 9])
    return [
        request(f"r{i}", p, max_tokens, prompt_logprobs=None if i in (1, 3) else num_top) for i, p in enumerate(made)
    ]


def scores(outputs: list[StepOutput]) -> dict[str, list[TokenLogprobs]]:
    """By request; set on the first output, and only there."""
    found: dict[str, list[TokenLogprobs]] = {}
    seen = set()
    for output in outputs:
        if output.prompt_logprobs is not None:
            assert output.request_id not in seen
            found[output.request_id] = output.prompt_logprobs
        seen.add(output.request_id)
    return found


def scored(core: EngineCore, requests: list[Request]) -> dict[str, list[TokenLogprobs]]:
    return scores(run(core, requests).outputs)


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[str, list[TokenLogprobs]]:
    found: dict[str, list[TokenLogprobs]] = {}
    for req in batch():
        found |= scored(engine(model), [req])
    return found


@pytest.mark.parametrize("num_top", [0, 1, NUM_TOP])
def test_they_are_a_plain_log_softmax(model: Any, reference: Any, num_top: int) -> None:
    requests = batch(num_top)
    found = scored(engine(model), requests)
    assert set(found) == {r.request_id for r in requests if r.prompt_logprobs is not None}
    for req in requests:
        if req.prompt_logprobs is None:
            continue
        expected = reference(torch.tensor([req.prompt_ids])).logits[0, :-1].double().log_softmax(-1)
        entries = found[req.request_id]
        assert [e.token_id for e in entries] == req.prompt_ids[1:]
        for entry, row in zip(entries, expected, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert entry.top_ids == row.topk(num_top).indices.tolist()
            assert entry.top_logprobs == pytest.approx(row.topk(num_top).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 256])
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_chunks_drafts_and_neighbours_change_no_bit(
    model: Any, alone: Any, drafter: str, budget: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PROMPT_LOGPROB_ROWS", rows)
    assert scored(engine(model, drafter, budget=budget, max_num_seqs=4), batch()) == alone


def test_no_step_keeps_more_logits_than_the_bound(model: Any, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PROMPT_LOGPROB_ROWS", 5)
    widths = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def forward(self, token_ids: Any, pools: Any, attn: Any, logits_at: Any, layers: Any = ()) -> Any:
            widths.append((len(token_ids), len(logits_at)))
            return model.forward(token_ids, pools, attn, logits_at, layers)

    core = engine(Counting(), max_num_seqs=8)
    assert scored(core, batch()) == alone
    least = max(1, model.min_rows)
    assert max(logits for _, logits in widths) <= max(5 + 8, least)
    assert max(tokens for tokens, _ in widths) > 20, "other prompts are not held up"


@pytest.mark.parametrize("drafter", ["none", "suffix", "small-lm"])
def test_preemption_neither_loses_nor_doubles_any(model: Any, other_model: Any, alone: Any, drafter: str) -> None:
    core = engine(model, drafter, draft_model=other_model, num_blocks=24, budget=5, max_num_seqs=8)
    assert scored(core, batch(max_tokens=24)) == alone
    assert core.stats().num_preemptions > 0


@pytest.mark.parametrize("after", range(1, 5))
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_one_that_loses_its_place_in_the_middle_of_the_prompt(
    model: Any, alone: Any, after: int, prefix_cache: bool
) -> None:
    """It may find its own blocks again, as far as they are scored."""
    core = engine(model, budget=5, prefix_cache=prefix_cache)
    assert core.submit(batch()[0]) is None
    outputs: list[StepOutput] = []
    for _ in range(after):
        outputs += core.step()
    seq = core.scheduler.by_id["r0"]
    num_done = seq.num_computed
    core.scheduler.preempt(seq)
    while core.has_work:
        outputs += core.step()
        core.check_integrity()
    assert scores(outputs) == {"r0": alone["r0"]}
    again = num_done % 4 if prefix_cache else num_done
    ran = core.stats().num_prefill_tokens
    assert len(batch()[0].prompt_ids) + again - 4 <= ran <= len(batch()[0].prompt_ids) + again + 4


def test_those_that_must_wait_for_their_share_of_rows_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PROMPT_LOGPROB_ROWS", 5)
    sizes = Limits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, block_size=4, num_blocks=99)
    planner = scheduler.Scheduler(sizes)
    for i, wanted in enumerate([0, 0, None]):
        planner.submit(request(f"r{i}", [i] * 20, prompt_logprobs=wanted))
    scheduled = planner.schedule(lambda rows, eligible: 0)
    assert scheduled is not None
    plan, sequences = scheduled
    assert [(seq.request.request_id, row.num_tokens) for row, seq in zip(plan.rows, sequences, strict=True)] == [
        ("r0", 5),
        ("r2", 20),
    ]


def test_it_does_not_wait_for_blocks_that_it_may_not_use(model: Any, alone: Any) -> None:
    core = engine(model, budget=6)
    first = batch()[0]
    core.submit(request("plain", first.prompt_ids, 6))
    core.submit(first)
    outputs = core.step()
    assert core.stats().num_running == 2
    outputs += run(core, []).outputs
    assert scores(outputs) == {"r0": alone["r0"]}


def test_a_cached_prefix_is_computed_again(model: Any, alone: Any, greedy: Any) -> None:
    core = engine(model)
    first = batch()[0]
    for _ in range(2):
        answers = run(core, [first])
        assert scores(answers.outputs) == {"r0": alone["r0"]}
        assert answers["r0"] == greedy(first.prompt_ids, 6)
        assert answers.outputs[0].num_cached == 0
    plain = run(core, [request("plain", first.prompt_ids, 6)])
    assert plain.outputs[0].num_cached == (len(first.prompt_ids) - 1) // 4 * 4, "what it computed serves others"
    assert core.stats().num_cached_tokens == plain.outputs[0].num_cached


def test_sampling_parameters_leave_them_raw(model: Any, alone: Any) -> None:
    loud = SamplingParams(temperature=2.0, seed=1, top_k=2, frequency_penalty=1.0, logit_bias={5: 9.0}, logprobs=1)
    req = request("r0", batch()[0].prompt_ids, 6, sampling=loud, prompt_logprobs=NUM_TOP)
    assert scored(engine(model), [req]) == {"r0": alone["r0"]}


def test_what_is_not_a_number_fails_the_request(model: Any) -> None:
    """Though its last token alone would not show it."""
    prompt = batch()[0].prompt_ids

    class Poisoned:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def forward(self, token_ids: Any, pools: Any, attn: Any, logits_at: Any, layers: Any = ()) -> Any:
            logits, features = model.forward(token_ids, pools, attn, logits_at, layers)
            logits[2] = torch.nan
            return logits, features

    core = engine(Poisoned())
    (output,) = core.generate([request("bad", prompt, 6, prompt_logprobs=0)])
    assert output.finish_reason is FinishReason.ERROR
    assert output.prompt_logprobs is None
