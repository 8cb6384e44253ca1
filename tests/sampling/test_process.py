from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.sampling import filters
from server.sampling.process import process
from server.sampling.state import SamplingBatch
from server.spec.types import Drafts, Layout, SlotState

V = 2000
GREEDY = SamplingParams(temperature=0.0)


def language_like(num_positions: int, seed: int = 0, vocab_size: int = V) -> Tensor:
    """A few likely tokens over a long tail."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_positions, vocab_size, generator=generator) * 1.5
    hot = torch.randint(0, vocab_size, (num_positions, 12), generator=generator)
    return logits.scatter_add_(1, hot, torch.rand(num_positions, 12, generator=generator) * 14)


def one_each(num_rows: int) -> Layout:
    return Layout(torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.int64), num_rows, 1)


def empty_state(num_rows: int) -> SlotState:
    return SlotState(*(torch.zeros(num_rows, *shape, dtype=torch.int64) for shape in ((4,), (), ())))


def run(logits: Tensor, params: list[SamplingParams], vocab_size: int = V) -> Tensor:
    """Processed logits over the vocabulary, one position a row, no history."""
    n = len(params)
    batch = SamplingBatch.of(params, vocab_size)
    drafts = Drafts.none(n, logits.device)
    return process(logits, one_each(n), drafts, batch, empty_state(n), torch.arange(n), 4).to_dense()


def kept(processed: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().squeeze(1).tolist() for row in processed]


def naive_keep(logits: Tensor, params: SamplingParams) -> list[int]:
    """Kept token ids, by the definitions, a token at a time in float64."""
    scaled = logits.double() / params.temperature
    order = scaled.argsort(descending=True).tolist()
    if params.top_k:
        order = [t for t in order if scaled[t] >= scaled[order[min(params.top_k, len(order)) - 1]]]
    probs = dict(zip(order, scaled[order].softmax(-1).tolist(), strict=True))
    if params.top_p < 1.0:
        mass, last = 0.0, order[0]
        for last in order:
            mass += probs[last]
            if mass >= params.top_p:
                break
        order = [t for t in order if scaled[t] >= scaled[last]]
    return sorted(t for t in order if probs[t] >= params.min_p * probs[order[0]])


def test_greedy_without_anything_is_free() -> None:
    logits = language_like(3)
    state = empty_state(3)
    batch = SamplingBatch.of([GREEDY] * 3, V)
    processed = process(logits, one_each(3), Drafts.none(3, logits.device), batch, state, torch.arange(3), 4)
    assert processed.logits is logits and processed.ids is None


@pytest.mark.parametrize("params", [
    SamplingParams(top_k=1), SamplingParams(top_k=40), SamplingParams(top_k=256), SamplingParams(top_k=257),
    SamplingParams(top_k=1500), SamplingParams(top_k=V), SamplingParams(top_k=10 * V),
    SamplingParams(top_p=1e-6), SamplingParams(top_p=0.3), SamplingParams(top_p=0.95), SamplingParams(top_p=0.999),
    SamplingParams(temperature=3.0, top_p=0.8), SamplingParams(temperature=30.0, top_p=0.97),
    SamplingParams(min_p=0.02), SamplingParams(min_p=1.0), SamplingParams(temperature=20.0, min_p=0.8),
    SamplingParams(temperature=2.0, top_k=400, top_p=0.9), SamplingParams(top_k=5, top_p=0.5, min_p=0.1),
    SamplingParams(temperature=5.0, top_k=1200, top_p=0.99, min_p=0.01),
])  # fmt: skip
def test_filters_keep_what_their_definitions_say(params: SamplingParams) -> None:
    logits = language_like(4)
    assert kept(run(logits, [params] * 4)) == [naive_keep(row, params) for row in logits]
    scaled = logits / params.temperature
    processed = run(logits, [params] * 4)
    assert torch.equal(processed[processed.isfinite()], scaled[processed.isfinite()])


@pytest.mark.parametrize("params", [SamplingParams(top_k=3), SamplingParams(top_p=0.5), SamplingParams(min_p=0.7),
                                    SamplingParams(top_k=300, top_p=0.6)])  # fmt: skip
def test_ties_at_the_threshold_are_all_kept(params: SamplingParams) -> None:
    """Also where equals go on past the largest few hundred: half-precision logits tie often."""
    logits = torch.zeros(2, V)
    logits[0, 5:700] = 4.0
    logits[1] = (language_like(1) * 2).round()[0] / 2
    assert kept(run(logits, [params] * 2)) == [naive_keep(row, params) for row in logits]


def test_top_p_counts_all_that_ties_with_the_last_of_top_k() -> None:
    """The mass that top_k left includes equals past the largest few, and nothing below them."""
    logits = torch.full((1, V), 2.0)
    logits[0, 7], logits[0, 100:200] = 6.0, 4.0
    for params in (SamplingParams(top_k=10, top_p=0.06), SamplingParams(top_k=10, top_p=0.08)):
        expected = naive_keep(logits[0], params)
        assert kept(run(logits, [params])) == [expected]
        assert kept(run(logits.repeat(2, 1), [params, SamplingParams()]))[0] == expected  # beside an unfiltered row
    assert kept(run(logits, [SamplingParams(top_k=10, top_p=0.06)])) == [[7]]


def test_masked_tokens_stay_masked() -> None:
    logits = torch.full((2, V), -float("inf"))
    logits[0, [3, 9]] = torch.tensor([1.0, 1.1])
    logits[1, 1234] = -5.0
    for params in (SamplingParams(top_p=0.9), SamplingParams(top_k=50), SamplingParams(min_p=0.1, top_p=0.99)):
        assert kept(run(logits, [params] * 2)) == [[3, 9], [1234]]


MIXED = [
    SamplingParams(top_p=0.9), SamplingParams(temperature=30.0, top_p=0.97), GREEDY, SamplingParams(temperature=0.5),
    SamplingParams(top_k=700), SamplingParams(min_p=0.05, top_k=3), SamplingParams(top_k=20, top_p=0.7),
]  # fmt: skip


@pytest.mark.parametrize("vocab_size", [V, 12_800, 50_257])
@pytest.mark.parametrize("all_filtered", [False, True])
def test_a_row_does_not_depend_on_its_batch(vocab_size: int, all_filtered: bool) -> None:
    """Bit for bit, whatever path the others force it through."""
    rows = [params for params in MIXED if params.top_k or params.top_p < 1.0 or not all_filtered]
    logits = language_like(len(rows), seed=3, vocab_size=vocab_size)
    together = run(logits, rows, vocab_size)
    for row, params in enumerate(rows):
        alone = run(logits[row : row + 1], [params], vocab_size)[0]
        if params.greedy:
            assert together[row].argmax() == alone.argmax() and together[row].amax() == alone.amax()
        else:
            assert torch.equal(together[row], alone)


@pytest.mark.parametrize("vocab_size", [V, 6400])
def test_candidates_and_full_sort_agree(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = language_like(len(MIXED), seed=4, vocab_size=vocab_size)
    quick = run(logits, MIXED, vocab_size)
    monkeypatch.setattr(filters, "_CANDIDATES", ())
    assert torch.equal(quick, run(logits, MIXED, vocab_size))


@pytest.mark.parametrize("vocab_size", [V, 64 * 65, 12_800])
@pytest.mark.parametrize("num", [64, 256])
def test_largest_is_topk(vocab_size: int, num: int) -> None:
    for logits in (language_like(5, vocab_size=vocab_size), language_like(5, vocab_size=vocab_size).round()):
        values, ids = filters._largest(logits, num)
        assert torch.equal(values, logits.topk(num).values)
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == num for row in ids.tolist())


def test_short_and_long_rows_share_candidates() -> None:
    """One row survives in hundreds of tokens, its neighbours in a few: each is as it is alone."""
    params = [SamplingParams(top_k=3), SamplingParams(top_k=200), SamplingParams(top_k=900), SamplingParams(top_p=0.5)]
    logits = language_like(4)
    logits[:, 0] = logits.amax(-1) - 1.0  # what pads short rows must not hide a token that survives
    batch = SamplingBatch.of(params, V)
    n = torch.arange(4)
    processed = process(logits, one_each(4), Drafts.none(4, logits.device), batch, empty_state(4), n, 4)
    assert processed.ids is not None and processed.logits.shape == (4, 1024)
    expected = [naive_keep(row, p) for row, p in zip(logits, params, strict=True)]
    assert kept(processed.to_dense()) == expected
    assert [row.nonzero().squeeze(1).tolist() for row in processed.probs()] == expected


def test_typical_filters_leave_candidates_only() -> None:
    batch = SamplingBatch.of([SamplingParams(top_p=0.95), GREEDY], V)
    state = empty_state(2)
    processed = process(language_like(2), one_each(2), Drafts.none(2, torch.device("cpu")), batch, state,
                        torch.arange(2), 4)  # fmt: skip
    assert processed.ids is not None and processed.logits.shape == (2, 64)


def penalised_once(logits: Tensor, prompt: list[int], output: list[int], params: SamplingParams) -> Tensor:
    """One position, as transformers' and OpenAI's definitions read."""
    result = logits.clone()
    for token in set(prompt + output):
        p = params.repetition_penalty
        result[token] = result[token] / p if result[token] > 0 else result[token] * p
    for token in set(output):
        result[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias.items():
        result[token] += bias
    return result if params.greedy else result / params.temperature


def penalty_batch() -> tuple[list[SamplingParams], list[list[int]], list[list[int]], Tensor]:
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=1.3, logit_bias={3: 4.0, 7: -100.0}),
        SamplingParams(temperature=0.7, presence_penalty=0.6, frequency_penalty=0.4),
        SamplingParams(temperature=0.9),
        SamplingParams(repetition_penalty=0.8, presence_penalty=-1.0, frequency_penalty=2.0, logit_bias={0: 1.0}),
    ]
    prompts = [[1, 2, 3], [4, 4, 5, 6], [0], [9, 9]]
    outputs = [[3, 3, 8], [5, 5, 5, 1], [2], []]
    return params, prompts, outputs, torch.tensor([[3, 8, 8], [2, 2, 5], [1, 1, 1], [9, 0, 0]])


def state_of(prompts: list[list[int]], outputs: list[list[int]]) -> SlotState:
    history = torch.full((len(prompts), 16), 10**12)  # undefined past the end: must never be used as an index
    history[:, 12:] = -1
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        history[row, : len(prompt + output)] = torch.tensor(prompt + output)
    lengths = [(len(p) + len(o), len(p)) for p, o in zip(prompts, outputs, strict=True)]
    num_tokens, prompt_len = torch.tensor(lengths).unbind(1)
    return SlotState(history, num_tokens.contiguous(), prompt_len.contiguous())


@pytest.mark.parametrize("ragged", [False, True])
def test_each_position_is_penalised_with_its_own_past(ragged: bool) -> None:
    params, prompts, outputs, tokens = penalty_batch()
    lengths = [3, 1, 2, 0] if ragged else [3, 3, 3, 3]
    rows = torch.tensor([r for r in range(4) for _ in range(lengths[r] + 1)])
    offsets = torch.tensor([j for r in range(4) for j in range(lengths[r] + 1)])
    logits = torch.randn(len(rows), 10, generator=torch.Generator().manual_seed(2))
    untouched = logits.clone()
    drafts = Drafts(tokens, torch.tensor(lengths))
    got = process(logits, Layout(rows, offsets, 4, 4), drafts, SamplingBatch.of(params, 10),
                  state_of(prompts, outputs), torch.arange(4), 14)  # fmt: skip
    assert torch.equal(logits, untouched)
    for t, (r, j) in enumerate(zip(rows.tolist(), offsets.tolist(), strict=True)):
        expected = penalised_once(logits[t], prompts[r], outputs[r] + tokens[r, :j].tolist(), params[r])
        torch.testing.assert_close(got.logits[t], expected)


def test_rows_may_live_in_any_slot_and_the_bound_may_be_loose() -> None:
    params, prompts, outputs, _ = penalty_batch()
    state = state_of(prompts[::-1], outputs[::-1])
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    batch, slots = SamplingBatch.of(params, 10), torch.tensor([3, 2, 1, 0])
    tight, loose = (
        process(logits, one_each(4), Drafts.none(4, logits.device), batch, state, slots, bound) for bound in (8, 16)
    )
    assert torch.equal(tight.logits, loose.logits)
    for r in range(4):
        torch.testing.assert_close(tight.logits[r], penalised_once(logits[r], prompts[r], outputs[r], params[r]))


def test_neutral_rows_keep_their_bits_beside_penalised_ones() -> None:
    params, prompts, outputs, _ = penalty_batch()
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    got = process(logits, one_each(4), Drafts.none(4, logits.device), SamplingBatch.of(params, 10),
                  state_of(prompts, outputs), torch.arange(4), 8)  # fmt: skip
    assert torch.equal(got.logits[2], logits[2] / torch.tensor(0.9))


def test_a_drafter_processes_its_own_draft_j() -> None:
    """One position a row at offset j: the same numbers as the target's position j of the whole window."""
    params, prompts, outputs, tokens = penalty_batch()
    batch, state, slots = SamplingBatch.of(params, 10), state_of(prompts, outputs), torch.arange(4)
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(2))
    layout = Layout(slots.repeat_interleave(4), torch.arange(4).repeat(4), 4, 4)
    window = process(logits, layout, Drafts(tokens, torch.full((4,), 3)), batch, state, slots, 8).logits.view(4, 4, 10)
    for j in range(4):
        step = process(logits.view(4, 4, 10)[:, j], Layout(slots, torch.full((4,), j), 4, 1),
                       Drafts(tokens[:, :j], torch.full((4,), j)), batch, state, slots, 8)  # fmt: skip
        assert torch.equal(step.logits, window[:, j])
