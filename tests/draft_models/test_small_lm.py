"""The small-LM drafter against its own model: what it drafts, what it computes, what it forgets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from draft_models import small_lm
from draft_models.small_lm import SmallLMDrafter
from server.core import SamplingParams
from server.models.loader import load_model
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, Drafts, SlotState

BLOCK_SIZE = 4
NUM_BLOCKS = 40
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    raw = json.loads((tiny_llama_dir / "config.json").read_text())
    return load_model(tiny_llama_dir, raw, torch.device("cpu"), torch.float32, 160)


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval()


class Rows:
    """Sequences in slots, with blocks that do not lie side by side, and the carry that the runner would make."""

    def __init__(self, drafter: SmallLMDrafter, sequences: dict[int, list[int]]) -> None:
        self.drafter, self.sequences = drafter, sequences
        self.blocks = {slot: list(range(1 + i, NUM_BLOCKS, len(sequences))) for i, slot in enumerate(sequences)}
        for slot, tokens in sequences.items():
            drafter.admit(slot, tokens, len(tokens))

    def emit(self, slot: int, tokens: list[int]) -> None:
        self.sequences[slot] = self.sequences[slot] + tokens
        self.drafter.observe(slot, tokens)

    def carry(self, limits: dict[int, int]) -> Carry:
        slots = list(limits)
        state = SlotState(*(torch.zeros(n, dtype=torch.int64) for n in ((4, 120), (4,), (4,))))
        for slot, tokens in self.sequences.items():
            state.history[slot, : len(tokens)] = torch.tensor(tokens)
            state.num_tokens[slot] = state.prompt_len[slot] = len(tokens)
        lengths = [len(self.sequences[slot]) for slot in slots]
        return Carry(
            slots=slots,
            slot_ids=torch.tensor(slots),
            state=state,
            max_tokens_host=max(lengths),
            limits=list(limits.values()),
            block_tables=torch.zeros(len(slots), 1, dtype=torch.int64),
            blocks=[self.blocks[slot] for slot in slots],
            tokens_host=lengths,
        )

    def propose(self, k: int, limits: dict[int, int], sampling: SamplingParams = GREEDY) -> Drafts:
        batch = SamplingBatch.of([sampling] * len(limits), self.drafter.model.vocab_size)
        return self.drafter.propose(self.carry(limits), k, batch)


def make(model: Any, rule: str = "coupled") -> SmallLMDrafter:
    return SmallLMDrafter(model, 4, NUM_BLOCKS, BLOCK_SIZE, rule)


def greedy(reference: Any, tokens: list[int], k: int) -> list[int]:
    ids = torch.tensor([tokens])
    out = reference.generate(ids, max_new_tokens=k, do_sample=False, eos_token_id=None, pad_token_id=0)
    found: list[int] = out[0, len(tokens) :].tolist()
    return found


def prompt(length: int, seed: int) -> list[int]:
    found: list[int] = torch.randint(3, 288, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


@pytest.mark.parametrize("k", [1, 2, 5])
def test_it_drafts_what_its_model_would_say(model: Any, reference: Any, k: int) -> None:
    rows = Rows(make(model), {0: prompt(9, 0), 2: prompt(17, 1)})
    drafts = rows.propose(k, {0: k, 2: k})
    for row, slot in enumerate((0, 2)):
        assert drafts.tokens[row].tolist() == greedy(reference, rows.sequences[slot], k)
    assert drafts.num_valid_host == drafts.num_valid.tolist() == [k, k]
    assert drafts.probs is None


def test_limits_bound_rows_one_by_one(model: Any, reference: Any) -> None:
    rows = Rows(make(model), {0: prompt(9, 0), 1: prompt(6, 1), 2: prompt(7, 2)})
    drafts = rows.propose(5, {0: 2, 1: 0, 2: 4})
    assert drafts.num_valid_host == [2, 0, 4]
    assert drafts.tokens.shape == (3, 4), "no wider than the row that may draft most"
    assert bool(((drafts.tokens >= 0) & (drafts.tokens < 288)).all()), "valid ids, also where they do not count"
    assert drafts.tokens[0, :2].tolist() == greedy(reference, rows.sequences[0], 2)
    assert drafts.tokens[2].tolist() == greedy(reference, rows.sequences[2], 4)


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_it_goes_on_from_whatever_was_committed(model: Any, reference: Any, accepted: int) -> None:
    """Rejected drafts have left keys and values behind; they must not be seen."""
    rows = Rows(make(model), {1: prompt(7, 3)})
    first = rows.propose(3, {1: 3}).tokens[0].tolist()
    rows.emit(1, [*first[:accepted], 77])
    assert rows.propose(4, {1: 4}).tokens[0].tolist() == greedy(reference, rows.sequences[1], 4)


def test_a_pause_leaves_a_gap_that_is_closed(model: Any, reference: Any) -> None:
    rows = Rows(make(model), {0: prompt(5, 4)})
    rows.propose(2, {0: 2})
    rows.drafter.pause()
    for seed in range(5):
        rows.emit(0, prompt(3, 50 + seed))
    assert rows.propose(3, {0: 3}).tokens[0].tolist() == greedy(reference, rows.sequences[0], 3)


def test_a_long_gap_is_closed_in_chunks(model: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_lm, "CATCH_UP_CHUNK", 5)
    rows = Rows(make(model), {0: prompt(23, 5), 1: prompt(5, 6), 2: prompt(11, 7)})
    drafts = rows.propose(2, {0: 2, 1: 2, 2: 2})
    assert drafts.tokens.tolist() == [greedy(reference, rows.sequences[slot], 2) for slot in range(3)]


def test_a_slot_that_changed_hands_starts_anew(model: Any, reference: Any) -> None:
    drafter = make(model)
    Rows(drafter, {0: prompt(20, 8)}).propose(3, {0: 3})
    drafter.release(0)
    rows = Rows(drafter, {0: prompt(12, 9)})
    assert rows.propose(3, {0: 3}).tokens[0].tolist() == greedy(reference, rows.sequences[0], 3)


def test_each_committed_token_is_computed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catch-up after a step is what the step committed, not the whole sequence."""
    lengths: list[int] = []
    forward = model.forward

    def counting(token_ids: Any, *rest: Any) -> Any:
        lengths.append(len(token_ids))
        return forward(token_ids, *rest)

    rows = Rows(make(model), {0: prompt(30, 10)})
    monkeypatch.setattr(model, "forward", counting)
    rows.propose(3, {0: 3})
    assert lengths[0] == 30
    rows.emit(0, [5, 6, 7])
    lengths.clear()
    rows.propose(3, {0: 3})
    assert lengths == [max(n, model.min_rows) for n in (3, 1, 1)]


def test_coupled_drafts_depend_on_seed_and_place_only(model: Any) -> None:
    sampling = SamplingParams(temperature=1.0, seed=11)
    together = Rows(make(model), {0: prompt(9, 0), 3: prompt(17, 1)})
    alone = Rows(make(model), {3: prompt(17, 1)})
    expected = alone.propose(4, {3: 4}, sampling)
    assert expected.probs is None, "coupled needs no q"
    assert together.propose(4, {0: 4, 3: 4}, sampling).tokens[1].tolist() == expected.tokens[0].tolist()
    other = Rows(make(model), {3: prompt(17, 1)}).propose(4, {3: 4}, SamplingParams(temperature=1.0, seed=12))
    assert other.tokens.tolist() != expected.tokens.tolist()


def test_under_ratio_q_is_the_models_own_distribution(model: Any, reference: Any) -> None:
    rows = Rows(make(model, "ratio"), {0: prompt(9, 0)})
    drafts = rows.propose(3, {0: 3}, SamplingParams(temperature=0.7, seed=3))
    assert drafts.probs is not None
    drawn = drafts.tokens[0].tolist()
    logits = reference(torch.tensor([[*rows.sequences[0], *drawn]])).logits[0, 8:11]
    torch.testing.assert_close(drafts.probs[0], torch.softmax(logits / 0.7, -1), atol=1e-5, rtol=1e-3)


def test_nothing_is_written_outside_the_rows_own_blocks(model: Any) -> None:
    """Limits say how far a row owns blocks: 7 known tokens and a draft fill two blocks of four."""
    rows = Rows(make(model), {0: prompt(7, 0)})
    rows.blocks[0] = [3, 9]
    for pool in rows.drafter.pools:
        pool.fill_(-7.0)
    rows.propose(5, {0: 1})
    for pool in rows.drafter.pools:
        touched = (pool != -7.0).any(-1).any(-1).view(NUM_BLOCKS, BLOCK_SIZE).any(-1).nonzero().flatten().tolist()
        assert set(touched) <= {0, 3, 9}
