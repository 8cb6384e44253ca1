"""No answer ends before its `min_tokens`: per position of the window, and nothing else changes by a bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.sampling.logprobs import emitted_logprobs
from server.sampling.process import process
from server.sampling.rng import TARGET, noise_keys
from server.sampling.state import SamplingBatch, SamplingState
from server.spec.types import Drafts, Layout, SlotState
from server.spec.verify import verify

V = 640
INF = float("inf")
SAMPLED = SamplingParams(temperature=0.7, seed=3)
GREEDY = SamplingParams(temperature=0.0)

Row = tuple[SamplingParams, int, list[int], int]
"""(how it samples, min_tokens, ends, tokens in its output so far)"""


def batch_of(rows: list[Row]) -> tuple[SamplingBatch, SlotState]:
    state = SamplingState(len(rows), V, torch.device("cpu"))
    for slot, (params, min_tokens, ends, _) in enumerate(rows):
        state.set(slot, params, 0, min_tokens, ends)
    slots = torch.arange(len(rows))
    prompt = torch.full((len(rows),), 5)
    output = torch.tensor([row[3] for row in rows])
    return state.gather(slots.tolist(), slots), SlotState(torch.zeros(len(rows), 32).long(), prompt + output, prompt)


def window(num_rows: int, k: int) -> Layout:
    return Layout(
        torch.arange(num_rows).repeat_interleave(k + 1), torch.arange(k + 1).repeat(num_rows), num_rows, k + 1
    )


def run(logits: Tensor, layout: Layout, rows: list[Row]) -> Tensor:
    batch, state = batch_of(rows)
    drafts = Drafts(torch.zeros(len(rows), layout.width - 1).long(), torch.full((len(rows),), layout.width - 1))
    return process(logits, layout, drafts, batch, state, torch.arange(len(rows)), 32).to_dense()


@pytest.mark.parametrize("ragged", [False, True])
def test_each_position_counts_the_drafts_before_it(ragged: bool) -> None:
    """Plain decoding would have had output + j tokens at offset j."""
    rows: list[Row] = [
        (SAMPLED, 4, [7, 9], 2),  # two early positions, then free
        (SAMPLED, 0, [], 0),
        (GREEDY, 9, [3], 1),  # all early
        (SAMPLED, 2, [7], 2),  # none
        (SAMPLED, 3, list(range(20)), 0),
    ]
    lengths = [4, 2, 3, 4, 1] if ragged else [4] * 5
    layout = Layout(
        torch.tensor([r for r in range(5) for _ in range(lengths[r])]),
        torch.tensor([j for r in range(5) for j in range(lengths[r])]),
        5,
        4,
    )
    logits = torch.randn(sum(lengths), V, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    got = run(logits, layout, rows)
    assert torch.equal(logits, before)
    free = run(logits, layout, [(params, 0, [], output) for params, _, _, output in rows])
    for t, (r, j) in enumerate(zip(layout.rows.tolist(), layout.offsets.tolist(), strict=True)):
        _, min_tokens, ends, output = rows[r]
        expected = free[t].clone()
        if output + j < min_tokens:
            expected[ends] = -INF
        assert torch.equal(got[t], expected), (r, j)


def test_ends_are_masked_after_penalties_and_bias_and_before_the_filters() -> None:
    """A banned favourite is out of the nucleus, and top_k counts the others."""
    logits = torch.zeros(1, V)
    logits[0, :6] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    for params in (SamplingParams(top_k=2, logit_bias={0: 100.0}), SamplingParams(top_p=0.6)):
        rows: list[Row] = [(params, 1, [0, 2], 0)]
        assert run(logits, window(1, 0), rows)[0].isfinite().nonzero().squeeze(1).tolist() in ([1, 3], [1])
        assert bool(run(logits, window(1, 0), [(params, 1, [0, 2], 1)])[0, 0].isfinite())


def test_reported_log_probabilities_stay_raw() -> None:
    logits = torch.randn(3, V)
    rows: list[Row] = [(replace(GREEDY, logprobs=1), 9, [int(t)], 0) for t in logits.argmax(-1)]
    batch, state = batch_of(rows)
    none = Drafts.none(3, logits.device)
    processed = process(logits, window(3, 0), none, batch, state, torch.arange(3), 32)
    verdict = verify(processed, window(3, 0), none, batch, state.num_tokens, "coupled")
    best = logits.topk(2).indices
    assert verdict.tokens.squeeze(1).tolist() == best[:, 1].tolist()
    found = emitted_logprobs(logits, window(3, 0), verdict, 1)
    assert found.top_ids.flatten().tolist() == best[:, 0].tolist()
    assert torch.equal(found.chosen.squeeze(1), logits.log_softmax(-1).gather(1, best[:, 1:]).squeeze(1))


def test_what_is_drawn_is_the_distribution_without_the_ends() -> None:
    """The same noise decides among what is left."""
    n = 4000
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(5)).mul(2).expand(n, V).contiguous()
    ends = logits[0].topk(3).indices.tolist()
    one, state = batch_of([(SamplingParams(), 9, ends, 0)])
    assert one.end_ids is not None and one.min_tokens is not None
    batch = replace(
        SamplingBatch.of([SamplingParams()] * n, V),
        seeds=torch.arange(n),
        end_ids=one.end_ids.expand(n, -1),
        min_tokens=one.min_tokens.expand(n),
    )
    slots = torch.zeros(n, dtype=torch.int64)
    processed = process(logits, window(n, 0), Drafts.none(n, logits.device), batch, state, slots, 32)
    tokens = processed.sample(noise_keys(batch.seeds, batch.choices, torch.full((n,), 5), TARGET))
    assert not set(tokens.tolist()) & set(ends)
    expected = logits[0].double().index_fill(0, torch.tensor(ends), -INF).softmax(-1)
    found = torch.bincount(tokens, minlength=V).double() / n
    assert (found - expected).abs().sum() < (V / n) ** 0.5


# -- the slot-resident state -------------------------------------------------------------------------------


def gather(state: SamplingState, *slots: int) -> SamplingBatch:
    return state.gather(list(slots), torch.tensor(slots))


def banned(batch: SamplingBatch) -> list[set[int]]:
    """Ends of each row of which the first tokens may be none."""
    assert batch.end_ids is not None and batch.min_tokens is not None
    return [
        set(ids) if least else set()
        for ids, least in zip(batch.end_ids.tolist(), batch.min_tokens.tolist(), strict=True)
    ]


def test_a_wider_neighbour_adds_no_end_to_a_row() -> None:
    state = SamplingState(3, V, torch.device("cpu"))
    state.set(0, SAMPLED, 0, 4, [11, 12])
    state.set(1, SAMPLED, 0, 4, list(range(100, 140)))
    state.set(2, SAMPLED, 0, 4, [5])
    assert banned(gather(state, 2, 0, 1)) == [{5}, {11, 12}, set(range(100, 140))]


def test_a_slot_does_not_inherit_ends() -> None:
    state = SamplingState(2, V, torch.device("cpu"))
    state.set(0, SAMPLED, 0, 4, [11, 12])
    state.set(1, SAMPLED, 0, 4, [5])
    state.set(0, SAMPLED, 0, 4, [])  # nothing ends it: min_tokens means nothing
    assert banned(gather(state, 0, 1)) == [set(), {5}]
    state.clear(1)
    state.set(1, SAMPLED, 0)
    assert gather(state, 0, 1).end_ids is None
    assert not state.early_slots


def test_rows_that_are_past_it_cost_nothing() -> None:
    state = SamplingState(2, V, torch.device("cpu"))
    state.set(0, SAMPLED, 0, 4, [11])
    state.set(1, SAMPLED, 0, 4, [12])
    assert set(state.early_slots) == {0, 1}
    state.end_freely(0)
    assert gather(state, 0).end_ids is None
    assert gather(state, 0, 1).end_ids is not None
    state.end_freely(1)
    assert gather(state, 0, 1).end_ids is None
    with pytest.raises(ValueError, match=f"end_ids: token id {V}"):
        state.set(0, SAMPLED, 0, 4, [V])
