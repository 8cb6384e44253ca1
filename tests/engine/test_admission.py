"""Sequences that are admitted together fill their slots as they would one by one."""

from __future__ import annotations

import random

import pytest
import torch

from server.core import Request, SamplingParams
from server.engine.draft_kv import FeatureSpan
from server.engine.gpu import admission
from server.engine.gpu.admission import Admission
from server.engine.gpu.state import DeviceState, make_state
from server.engine.sequence import Sequence
from server.engine.step_runner import RunnerShape
from server.sampling.state import SamplingState

VOCAB_SIZE = 50
SLOTS = 7
CPU = torch.device("cpu")
KINDS = [
    SamplingParams(temperature=0.0, seed=2**63 + 5),
    SamplingParams(temperature=0.7, top_k=9, top_p=0.9, min_p=0.1, seed=3),
    SamplingParams(temperature=1e-9, repetition_penalty=1.25, presence_penalty=0.5, frequency_penalty=-2.0),
    SamplingParams(logit_bias={3: 1.5, 4: -2.0}, seed=7),
]


def make() -> DeviceState:
    pool = torch.zeros(80, 2, 4)
    return make_state([pool], RunnerShape(SLOTS, 60, 3, 4, 20), VOCAB_SIZE, CPU)


def sequences(seed: int, slots: list[int]) -> list[Sequence]:
    draw = random.Random(seed)
    made = []
    for i, slot in enumerate(slots):
        prompt = draw.choices(range(VOCAB_SIZE), k=draw.randint(1, 40))
        request = Request(f"{seed}.{i}", prompt, KINDS[(i + seed) % 4], choice=i, max_tokens=20, min_tokens=5 * (i % 2))
        seq = Sequence.of(request, frozenset({2, 11}))
        seq.token_ids += draw.choices(range(VOCAB_SIZE), k=draw.choice([0, 0, 7]))  # it was preempted
        seq.slot = slot
        if slot in HITS:  # of blocks of 4 tokens
            first, seq.num_computed, block = HITS[slot]
            seq.blocks = [9] * (seq.num_computed // 4 - 1) + [block, 9, 9]
            seq.draft_kv = FeatureSpan(3, first, seq.num_computed) if first < seq.num_computed else None
        made.append(seq)
    return made


HITS = {1: (4, 12, 7), 5: (8, 8, 3)}
"""slot -> first token of a prefix hit that the drafter can use, its tokens, its last block."""


def fill(state: DeviceState, batch: list[Sequence]) -> list[tuple[int, int]]:
    found = []
    for slots, num_tokens, cached in Admission(state).fill(batch):
        found += list(zip(slots.tolist(), num_tokens.tolist(), strict=True))
        hits = list(zip(cached.first.tolist(), cached.end.tolist(), cached.last_block.tolist(), strict=True))
        assert hits == [HITS.get(slot, (0, 0, 0)) for slot in slots.tolist()]
    return found


@pytest.mark.parametrize("room", [1, 120, 1 << 18])
def test_slots_hold_what_their_sequences_know(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_USUAL_SIZE", room)
    state = make()
    expected = SamplingState(SLOTS + 1, VOCAB_SIZE, CPU)
    expected.reserve(*(table.shape[1] for table in state.sampling.tables()[2::2]))
    history, slots = state.slots.history.clone(), state.slots
    lengths, prompts = slots.num_tokens.clone(), slots.prompt_len.clone()
    for seed, owners in enumerate(([3, 0, 6, 1, 5, 2], [1, 6], [], [4], [0, 1, 2, 3, 4, 5, 6])):
        batch = sequences(seed, owners)
        assert fill(state, batch) == [(seq.slot, seq.num_tokens) for seq in batch]
        for seq in batch:
            history[seq.slot, : seq.num_tokens] = torch.tensor(seq.token_ids)
            lengths[seq.slot], prompts[seq.slot] = seq.num_tokens, seq.prompt_len
            request = seq.request
            ends = seq.ends if seq.num_emitted < request.min_tokens else ()
            expected.set(seq.slot, request.sampling, request.choice, request.min_tokens, ends)
        assert torch.equal(slots.history, history)
        assert torch.equal(slots.num_tokens, lengths)
        assert torch.equal(slots.prompt_len, prompts)
        for found, wanted in zip(state.sampling.tables(), expected.tables(), strict=True):
            assert torch.equal(found, wanted)
        assert state.sampling.early_slots == expected.early_slots


@pytest.mark.parametrize("room", [1, 90, 120, 1 << 18])
@pytest.mark.parametrize("seed", range(4))
def test_an_admission_never_waits_for_its_own_uploads(seed: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_USUAL_SIZE", room)
    state = make()
    places = state.pools[0].shape[0]
    batch = sequences(seed, list(range(SLOTS)))
    while sum(seq.num_tokens for seq in batch) > places:
        batch.pop()
    assert len(batch) > 1
    size = max(room, state.max_context + admission._HEAD)
    num_uploads = sum(1 for _ in Admission(state).fill(batch))
    assert num_uploads <= admission.most_uploads(state, size)


def test_a_predecessors_bias_is_gone() -> None:
    state = make()
    values = state.sampling.tables()[3]
    biased, plain = sequences(3, [2])[0], sequences(0, [2])[0]
    fill(state, [biased])
    assert values[2].count_nonzero() == 2
    state.sampling.clear(2)
    fill(state, [plain])
    assert not values.any()


def test_what_is_not_in_the_vocabulary_is_refused() -> None:
    seq = Sequence.of(Request("r", [1], SamplingParams(logit_bias={VOCAB_SIZE: 1.0})))
    seq.slot = 0
    with pytest.raises(ValueError, match="logit_bias: token id 50 is not valid; use 0 to 49"):
        fill(make(), [seq])
