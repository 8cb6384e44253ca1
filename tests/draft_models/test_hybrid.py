"""The hybrid drafter on the CPU: who drafts for a row, what of it the learned drafter notices, what q says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from draft_models.hybrid import LEARNED, LONG_MATCH, ByLength, HybridDrafter
from draft_models.small_lm import SmallLMDrafter
from draft_models.suffix import CLASS_NAMES, LOOKUP_FAMILY, Match, SuffixDrafter
from server.core import SamplingParams
from server.models.loader import load_model
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, Drafts, Verdict
from tests.draft_models.test_small_lm import BLOCK_SIZE, GREEDY, NUM_BLOCKS, Rows

NEW = [5, 9, 17, 30, 41, 8]
REPEAT = [7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 7, 8, 9, 10, 11]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    raw = json.loads((tiny_llama_dir / "config.json").read_text())
    return load_model(tiny_llama_dir, raw, torch.device("cpu"), torch.float32, 160)


def chain_of(model: Any, rule: str = "coupled") -> SmallLMDrafter:
    return SmallLMDrafter(model, 4, NUM_BLOCKS, BLOCK_SIZE, rule)


class Told:
    """An arbiter that does what it is told, and remembers what it was asked."""

    def __init__(self, length: int, copying: Sequence[bool]) -> None:
        self.length, self.copying = length, list(copying)
        self.asked: list[tuple[list[Match | None], list[int], float]] = []

    def divide(self, matches: Sequence[Match | None], limits: Sequence[int], context: float) -> tuple[int, list[bool]]:
        self.asked.append((list(matches), list(limits), context))
        return self.length, self.copying

    def lengths(self, match: Match, k: int) -> int:
        raise AssertionError("not on a CPU")

    def lengths_of(self, family: int, k: int) -> int:
        raise AssertionError("not on a CPU")


class Counting(SmallLMDrafter):
    """Counts its passes by the number of tokens each runs."""

    passes: list[int]

    def _run(self, carry: Any, parts: Any, tokens: Any) -> Any:
        self.passes = [*getattr(self, "passes", []), sum(n for _, _, n in parts)]
        return super()._run(carry, parts, tokens)


def hybrid(model: Any, rule: str = "coupled", k: int = 6) -> HybridDrafter:
    made = HybridDrafter(SuffixDrafter(), chain_of(model, rule), k)
    made.model = made.learned.model  # type: ignore[attr-defined] # for Rows
    return made


def test_rows_copy_where_the_match_is_long_and_follow_the_chain_elsewhere(model: Any) -> None:
    drafter = hybrid(model)
    rows = Rows(drafter, {2: REPEAT, 0: NEW})  # type: ignore[arg-type]
    alone = Rows(chain_of(model), {0: NEW})
    drafts = rows.propose(6, {2: 6, 0: 3})
    assert drafts.classes == ["prompt:5-8", LEARNED]
    assert drafts.num_valid_host == [6, 3] and drafts.num_valid.tolist() == [6, 3]
    assert drafts.tokens[0].tolist() == [12, 13, 14, 15, 20, 7]
    assert drafts.tokens[1, :3].tolist() == alone.propose(6, {0: 3}).tokens[0].tolist()
    assert drafts.probs is None


def test_copies_may_be_longer_than_the_chain_and_shorter(model: Any) -> None:
    for length in (1, 2, 6):
        drafter = hybrid(model)
        drafter.arbiter = told = Told(length, [True, False])
        drafts = Rows(drafter, {2: REPEAT, 0: NEW}).propose(4, {2: 4, 0: 4})  # type: ignore[arg-type]
        assert drafts.num_valid_host == [4, min(length, 4)]
        assert drafts.tokens.shape == (2, 4)
        [(matches, limits, context)] = told.asked
        assert matches[0] is not None and matches[0].length == 5 and matches[1] is None
        assert limits == [4, 4] and context == (len(REPEAT) + len(NEW)) / 2


def test_without_a_chain_everything_that_matches_is_copied_and_nothing_runs(model: Any) -> None:
    chain = Counting(model, 4, NUM_BLOCKS, BLOCK_SIZE, "coupled")
    drafter = HybridDrafter(SuffixDrafter(), chain, 4)
    drafter.model = model  # type: ignore[attr-defined]
    drafter.arbiter = Told(0, [False, False])
    rows = Rows(drafter, {2: REPEAT, 0: NEW})  # type: ignore[arg-type]
    drafts = rows.propose(4, {2: 4, 0: 4})
    assert drafts.num_valid_host == [4, 0] and drafts.tokens[0].tolist() == [12, 13, 14, 15]
    carry = rows.carry({2: 4, 0: 4})
    carry.chunks = [(0, 3), (0, 3)]
    drafter.prefill(carry, torch.tensor([7, 8, 9, 5, 9, 17]), torch.zeros(6), torch.zeros(6), None)
    assert not hasattr(chain, "passes"), "while the chain is off its network does not run, prompts included"
    drafter.arbiter = Told(2, [True, False])
    drafter.propose(carry, 4, SamplingBatch.of([GREEDY] * 2, model.vocab_size))
    assert chain.passes == [len(NEW), 1], "the row that copies is not run"
    drafter.prefill(carry, torch.tensor([7, 8, 9, 5, 9, 17]), torch.zeros(6), torch.zeros(6), None)
    assert chain.passes[2:] == [3], "one row's keys are there already"


@pytest.mark.parametrize("num_copied", [1, 2, 5])
def test_after_steps_that_copied_the_chain_drafts_as_if_it_had_never_been_left_out(model: Any, num_copied: int) -> None:
    drafter, always = hybrid(model), Rows(chain_of(model), {2: REPEAT, 0: NEW})
    rows = Rows(drafter, {2: REPEAT, 0: NEW})  # type: ignore[arg-type]
    for step in range(3):
        drafter.arbiter = Told(3, [True, step == 1])
        rows.propose(4, {2: 4, 0: 4})
        always.propose(4, {2: 4, 0: 4})
        for both in (rows, always):
            both.emit(2, REPEAT[:num_copied])
            both.emit(0, [40 + step, 50 + step])
    drafter.arbiter = Told(4, [False, False])
    found, expected = rows.propose(4, {2: 4, 0: 4}), always.propose(4, {2: 4, 0: 4})
    assert torch.equal(found.tokens, expected.tokens) and found.num_valid_host == expected.num_valid_host
    assert found.classes == [LEARNED, LEARNED]


def test_what_it_was_drawn_from_is_a_point_mass_where_it_was_copied(model: Any) -> None:
    drafter = hybrid(model, "ratio")
    drafter.arbiter = Told(2, [True, False])
    rows = Rows(drafter, {2: REPEAT, 0: NEW})  # type: ignore[arg-type]
    warm = SamplingParams(temperature=1.0, seed=3)
    drafts = rows.propose(4, {2: 4, 0: 4}, warm)
    alone = Rows(chain_of(model, "ratio"), {2: REPEAT, 0: NEW}).propose(2, {2: 0, 0: 2}, warm)
    assert drafts.probs is not None and alone.probs is not None
    assert drafts.probs.shape == (2, 4, model.vocab_size)
    for j, token in enumerate(drafts.tokens[0].tolist()):
        assert drafts.probs[0, j, token] == 1.0 and drafts.probs[0, j].sum() == 1.0
    assert torch.equal(drafts.probs[1, :2], alone.probs[1]) and drafts.num_valid_host == [4, 2]
    rows.emit(2, [12])
    rows.emit(0, [3])
    narrow = drafter.propose(rows.carry({2: 1, 0: 4}), 4, SamplingBatch.of([warm] * 2, model.vocab_size))
    assert narrow.probs is not None and narrow.tokens.shape == (2, 2) and narrow.probs.shape[:2] == (2, 2)
    assert narrow.probs[0, 0].sum() == 1.0


def test_host_events_reach_both(model: Any) -> None:
    calls: list[tuple[str, ...]] = []

    class Spy:
        feature_layers = (1, 2, 3)

        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, *map(str, args)))

    drafter = HybridDrafter(SuffixDrafter(), Spy(), 4)  # type: ignore[arg-type]
    assert drafter.feature_layers == (1, 2, 3)
    drafter.admit(1, REPEAT, 3, [4])
    drafter.observe(1, [12])
    drafter.commit(None, Drafts.none(1, torch.device("cpu")), None, None)  # type: ignore[arg-type]
    drafter.pause()
    drafter.pause()
    drafter.commit(None, Drafts.none(1, torch.device("cpu")), None, None)  # type: ignore[arg-type]
    assert drafter.suffix.continuation(1, 2) == [13, 14]
    drafter.release(1, True)
    assert [name for name, *_ in calls] == ["admit", "observe", "commit", "pause", "release"]
    assert calls[0][1:] == ("1", str(REPEAT), "3", "[4]") and calls[-1][1:] == ("1", "True")


def test_while_only_copies_are_drafted_features_are_kept_for_a_learned_drafter_that_wants_them(model: Any) -> None:
    kept: list[tuple[list[int], list[float]]] = []
    seen: list[str] = []

    class Keeper:
        name, feature_layers = "keeper", (0, 1, 2)

        def keep(self, carry: Carry, counts: Sequence[int], features: torch.Tensor) -> None:
            kept.append((list(counts), features[:, 0].tolist()))

        def __getattr__(self, name: str) -> Any:
            return lambda *args: seen.append(name)

    drafter = HybridDrafter(SuffixDrafter(), Keeper(), 4)  # type: ignore[arg-type]
    rows = Rows(drafter, {2: REPEAT, 0: NEW})  # type: ignore[arg-type]
    carry = rows.carry({2: 4, 0: 4})
    carry.chunks = [(0, 1), (0, 2)]
    sampling = SamplingBatch.of([GREEDY] * 2, 8)
    features = torch.arange(6.0).view(2, 3, 1)
    verdict = Verdict(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([2, 0]), torch.tensor([3, 1]))
    for length, copying in ((0, [True, False]), (2, [True, True])):
        drafter.arbiter = Told(length, copying)
        drafts = drafter.propose(carry, 4, sampling)
        drafter.prefill(carry, torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.arange(3.0)[:, None])
        drafter.commit(carry, drafts, verdict, features)
    assert kept == [([1, 2], [0.0, 1.0, 2.0]), ([3, 1], [0.0, 1.0, 2.0, 3.0])]
    assert [name for name in seen if name not in ("admit", "observe")] == ["pause", "prefill", "commit"]


def test_by_length_knows_nothing_but_the_length() -> None:
    arbiter = ByLength(5)
    long, short = Match([1], LONG_MATCH, 0, False), Match([1], LONG_MATCH - 1, 0, False)
    assert arbiter.divide([long, short, None], [3, 3, 3], 9.0) == (5, [True, False, False])
    mask = arbiter.lengths(short, 3)
    assert [n for n in range(10) if mask >> n & 1] == list(range(LONG_MATCH, 10))
    assert arbiter.lengths_of(LOOKUP_FAMILY, 3) == mask


def test_names_of_classes_are_where_a_match_says_they_are() -> None:
    assert Match([1], 5, 0, False).name == "output:5-8"
    assert Match([1], 2, 1, True).name == "prompt:2?"
    assert Match([1], 40, 2, False).name == "shared:9+"
    assert Match([1], 0, 3, True).name == "predicted:start?"
    assert Match([], 0, 0, False).name == "none"
    assert CLASS_NAMES[LOOKUP_FAMILY + 2] == "lookup:2" and CLASS_NAMES[LOOKUP_FAMILY + 9] == "lookup:9+"
    assert CLASS_NAMES[Match([1], 1, 1, True).family + 3] == "prompt:3-4", "a longer match is not unsure"
