"""Adjusted logits are, bit for bit, what `server.sampling.process` has before the temperature."""

from __future__ import annotations

import pytest
import torch

from server.core import SamplingParams
from server.kernels.penalties import ADJUST_BLOCK, COUNT_BLOCK, adjust_by_slot, adjust_reference, make_counts
from tests.kernels.adjusting import LENGTH, PLAIN, kinds, make, many
from tests.kernels.conftest import ON_GPU

VOCABS = [64, 49_152, 128_256, 50_257] if ON_GPU else [1, 64, 150]


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("width", [1, 2, 6])
def test_equals_process(device: torch.device, dtype: torch.dtype, vocab_size: int, width: int) -> None:
    case = make(many(vocab_size), width, vocab_size, dtype, device)
    before = case.logits.clone()
    found = case.run()
    assert found.dtype == torch.float32
    assert torch.equal(found, case.expected())
    assert torch.equal(case.logits, before)
    if vocab_size > 1:
        changed = (found != case.logits.float()).view(len(case.slots), -1).any(1)
        assert changed.tolist() == [params is not PLAIN for params, _ in many(vocab_size)] + [False]


@pytest.mark.parametrize("width", [1, 5])
def test_reference(dtype: torch.dtype, width: int) -> None:
    """It is the definition, a row at a time."""
    case = make(kinds(40), width, 40, dtype, torch.device("cpu"), length=50)
    assert torch.equal(adjust_reference(*case.arguments), case.expected())


def test_steps_leave_nothing_for_the_next(device: torch.device) -> None:
    case = make(many(VOCABS[-1]), 4, VOCABS[-1], torch.float16, device)
    found = case.run()
    assert not case.counts.any()
    assert torch.equal(case.run(), found)
    case.state.num_tokens.clamp_(max=LENGTH // 3)
    case.state.prompt_len.clamp_(max=LENGTH // 3)
    assert torch.equal(case.run(), case.expected())


def test_drafts_count_from_the_next_position_on(device: torch.device) -> None:
    """The same draft three times, of a token that is new, in the prompt only, and in both."""
    rows = [(SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25), 0)] * 3
    case = make(rows, 5, 20, torch.float32, device, length=40)
    for slot, token in zip(case.slots[:3].tolist(), (9, 10, 11), strict=True):
        case.state.history[slot, :6] = torch.tensor([10, 11, 3, 4, 11, 5], device=device)
        case.state.num_tokens[slot], case.state.prompt_len[slot] = 6, 4
        case.drafts[case.slots.tolist().index(slot)] = torch.tensor([token, 2, token, token], device=device)
    case.logits.fill_(8.0)
    found = case.run().view(-1, 5, 20)
    assert torch.equal(found.view(-1, 20), case.expected())
    assert found[0, :, 9].tolist() == [8.0, 3.25, 3.25, 3.0, 2.75]
    assert found[1, :, 10].tolist() == [4.0, 3.25, 3.25, 3.0, 2.75]
    assert found[2, :, 11].tolist() == [3.25, 3.0, 3.0, 2.75, 2.5]


@pytest.mark.parametrize("length", [1, COUNT_BLOCK, COUNT_BLOCK + 1, 3 * COUNT_BLOCK * 40])
def test_histories_of_any_length(device: torch.device, length: int) -> None:
    """From one token to more than the programs of a row see at once; all of it prompt, or all but one token."""
    rows = [(SamplingParams(repetition_penalty=1.5), 0), (SamplingParams(frequency_penalty=0.01), 0)]
    case = make(rows, 2, ADJUST_BLOCK + 3, torch.float32, device, length=length + 5)
    case.state.history.random_(0, ADJUST_BLOCK + 3)
    for prompt in {1, length}:
        case.state.num_tokens[:-1] = length
        case.state.prompt_len[:-1] = prompt
        assert torch.equal(case.run(), case.expected())


@pytest.mark.parametrize("min_tokens", [0, 1, 3, 4, 100])
def test_ends_are_withheld_position_by_position(device: torch.device, min_tokens: int) -> None:
    case = make([(PLAIN, min_tokens)], 4, 30, torch.float32, device, length=40)
    slot = int(case.slots[0])
    case.state.num_tokens[slot], case.state.prompt_len[slot] = 10, 9
    found = case.run().view(-1, 4, 30)
    assert torch.equal(found.view(-1, 30), case.expected())
    withheld = found[0].isneginf().any(1).tolist()
    assert withheld == [1 + j < min_tokens for j in range(4)]
    assert not found[1].isneginf().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_stay_broken(device: torch.device, bad: float) -> None:
    """Even of an end that is withheld: whoever verifies must see it."""
    case = make([(SamplingParams(repetition_penalty=1.5, logit_bias={3: -9.0}), 100)], 1, 30, torch.float32, device)
    case.sampling.set(int(case.slots[0]), SamplingParams(repetition_penalty=1.5, logit_bias={3: -9.0}), 0, 10**9, [3])
    case.logits[0, 3] = bad
    found = case.run()[0]
    assert not found[3].isfinite() and not found[3].isneginf()
    assert found[:3].isfinite().all() and found[4:].isfinite().all()
    case.logits.fill_(-torch.inf)
    assert case.run()[0].isneginf().all()


def test_what_is_not_reserved_is_not_read(device: torch.device) -> None:
    """No room for biases or ends: the tables have no columns."""
    case = make([(SamplingParams(presence_penalty=1.0), 0)], 2, 50, torch.float32, device)
    case.sampling.reserve(0, 0)
    assert torch.equal(case.run(), case.expected())


def test_shapes_must_fit(device: torch.device) -> None:
    case = make([(PLAIN, 0)], 2, 50, torch.float32, device)
    with pytest.raises(ValueError, match="counts"):
        adjust_by_slot(*case.arguments, case.counts[:, :49])
    case.logits = case.logits[:3]
    with pytest.raises(ValueError, match="logits"):
        case.run()


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_graph_captures_it(device: torch.device) -> None:
    case = make(many(VOCABS[1]), 3, VOCABS[1], torch.bfloat16, device)
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run()
        with pytest.raises(RuntimeError, match="capturing"):
            make_counts(2, 2, device)
    for _ in range(2):
        case.logits.normal_()
        case.state.num_tokens.add_(1)
        case.state.history.random_(0, VOCABS[1])
        graph.replay()
        assert torch.equal(found, case.expected())
    assert not case.counts.any()
