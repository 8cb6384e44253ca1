"""The hybrid drafter inside a device step: what is copied there, what the chain is fed, what the host is told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draft_models.hybrid import LEARNED
from draft_models.hybrid_device import CopyingSampler, HybridDeviceDrafter
from draft_models.suffix import CLASS_NAMES, Match, SuffixDrafter
from server.models.loader import load_model
from server.spec.types import Drafts
from tests.draft_models.small_lm_world import MAX_DRAFTS, PADDING, World, greedy

REPEAT = [7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24, 25, 26, 27, 7, 8, 9, 10, 11]
NEW = [5, 9, 17, 30, 41, 8]


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


class Mask:
    """An arbiter with one answer."""

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self.asked: list[tuple[str, int]] = []

    def divide(self, matches: Any, limits: Any, context: float) -> tuple[int, list[bool]]:
        raise AssertionError("not on a GPU")

    def lengths(self, match: Match, k: int) -> int:
        self.asked.append((match.name, k))
        return self.mask

    def lengths_of(self, family: int, k: int) -> int:
        return self.mask


class Hybrid(World):
    """A world whose drafter is hybrid; `unseen` tokens are on the device but not on the host."""

    def __init__(self, model: Any, sequences: dict[int, list[int]], rule: str = "coupled", mask: int = -1) -> None:
        super().__init__(model, rule)
        self.chain = self.drafter
        self.hybrid = HybridDeviceDrafter(SuffixDrafter(), self.drafter, MAX_DRAFTS)
        self.hybrid.arbiter = self.arbiter = Mask(mask)
        for slot, tokens in sequences.items():
            self.tokens[slot], self.run[slot] = [], 0
            self.hybrid.admit(slot, tokens, len(tokens))
            self.tokens[slot] = tokens[:-1]
        self.prefill({slot: len(tokens) - 1 for slot, tokens in sequences.items()})
        for slot, tokens in sequences.items():
            self.tokens[slot] = tokens[:-1]
            self.emit(slot, tokens[-1:])

    def draft(
        self, slots: list[int], limits: list[int], k: int, temperature: float = 0.0, unseen: Sequence[int] = ()
    ) -> Drafts:
        real = [slot for slot in slots if slot != PADDING]
        uploads = self.hybrid.upload(real, limits[: len(real)], k)
        uploads += [[0] * self.hybrid.upload_width(k)] * (len(slots) - len(real))
        for slot in real:
            if unseen:
                self.emit(slot, list(unseen))
        step = replace(self.step(slots, limits, temperature), uploads=torch.tensor(uploads))
        assert step.uploads is not None and step.uploads.shape[1] == self.hybrid.upload_width(k)
        draft = self.hybrid.draft if self.hybrid.chain else self.hybrid.draft_copies
        return draft(step, k)


def told(drafts: Drafts) -> list[tuple[str, int]]:
    assert drafts.origins is not None
    return [HybridDeviceDrafter.origin_of(origin) for origin in drafts.origins.tolist()]


def test_each_row_copies_or_follows_its_chain(model: Any, reference: Any) -> None:
    world = Hybrid(model, {0: REPEAT, 2: NEW})
    drafts = world.draft([2, 0, PADDING], [4, 4, 0], 4)
    assert drafts.tokens[1].tolist() == [12, 13, 14, 15]
    assert drafts.tokens[0].tolist() == greedy(reference, NEW, 4)
    assert drafts.num_valid.tolist() == [4, 4, 0] and drafts.probs is None
    assert told(drafts) == [(LEARNED, 0), ("prompt:5-8", 4), (LEARNED, 0)]
    assert world.arbiter.asked == [("prompt:5-8", 4)], "nobody asks of rows without a match"


def test_what_is_copied_is_at_most_the_row_s_limit_and_the_chain_keeps_to_it_too(model: Any) -> None:
    world = Hybrid(model, {0: REPEAT, 2: NEW})
    drafts = world.draft([0, 2], [2, 1], 4)
    assert drafts.num_valid.tolist() == [2, 1]
    assert told(drafts) == [("prompt:5-8", 2), (LEARNED, 0)]


@pytest.mark.parametrize(
    ("unseen", "expected", "name"),
    [
        ([12, 13], [14, 15, 20, 21], "prompt:5-8"),
        ([12, 13, 14, 15], [20, 21, 22, 23], "prompt:9+"),
        ([12, 40], None, LEARNED),
    ],
)
def test_tokens_that_the_host_has_not_seen_lengthen_the_match_or_end_it(
    model: Any, reference: Any, unseen: list[int], expected: list[int] | None, name: str
) -> None:
    world = Hybrid(model, {0: REPEAT})
    drafts = world.draft([0], [4], 4, unseen=unseen)
    assert told(drafts)[0][0] == name
    if expected is not None:
        assert drafts.tokens[0].tolist() == expected


def test_where_the_text_left_the_foreseen_way_what_is_looked_up_is_copied(model: Any) -> None:
    unseen = [12, 40, 22, 23]
    for mask, copies in ((-1, True), (1 << 2, True), (~(1 << 2), False)):
        world = Hybrid(model, {0: REPEAT}, mask=mask)
        drafts = world.draft([0], [3], 4, unseen=unseen)
        assert told(drafts) == [("lookup:2", 3) if copies else (LEARNED, 0)]
        if copies:
            assert drafts.tokens[0, :3].tolist() == [24, 25, 26]
    world = Hybrid(model, {0: REPEAT}, mask=0)
    world.hybrid.chain = False
    assert told(world.draft([0], [4], 4, unseen=unseen)) == [("lookup:2", 4)], "whatever matches, without a chain"


def test_the_length_that_the_match_has_by_then_decides(model: Any) -> None:
    for mask, copies in ((1 << 7, True), (~(1 << 7), False), (1 << 5, False)):
        world = Hybrid(model, {0: REPEAT}, mask=mask)
        drafts = world.draft([0], [4], 4, unseen=[12, 13])
        assert (drafts.tokens[0].tolist() == [14, 15, 20, 21]) is copies
        assert told(drafts) == [("prompt:5-8", 4) if copies else (LEARNED, 0)]


def test_where_a_copy_ends_the_chain_goes_on_from_it(model: Any, reference: Any) -> None:
    """The prediction has two more tokens; the chain then drafts what it would after them."""
    world = Hybrid(model, {0: NEW})
    world.hybrid.admit(0, NEW, len(NEW), [70, 71])
    drafts = world.draft([0], [5], 5)
    assert told(drafts) == [("predicted:start", 2)]
    assert drafts.tokens[0, :2].tolist() == [70, 71]
    assert drafts.tokens[0, 2:].tolist() == greedy(reference, [*NEW, 70, 71], 3)
    assert drafts.num_valid.tolist() == [5]


def test_keys_of_accepted_copies_are_those_of_the_copies(model: Any, reference: Any) -> None:
    """What a step accepted is fed to no later one but for the last two tokens."""
    world = Hybrid(model, {0: REPEAT})
    world.draft([0], [4], 4)
    world.emit(0, [12, 13, 14, 15, 99])
    world.hybrid.observe(0, [12, 13, 14, 15, 99])
    drafts = world.draft([0], [4], 4)
    assert told(drafts) == [(LEARNED, 0)]
    assert drafts.tokens[0].tolist() == greedy(reference, world.tokens[0], 4)


def test_without_its_chain_it_copies_whatever_matches_and_catches_up_later(model: Any, reference: Any) -> None:
    world = Hybrid(model, {0: REPEAT, 2: NEW}, mask=0)
    seen = [len(REPEAT), len(NEW)]
    world.hybrid.chain = False
    for _ in range(2):
        drafts = world.draft([0, 2], [4, 4], 4)
        assert drafts.num_valid.tolist()[1] == 0 and told(drafts)[1] == (LEARNED, 0)
        taken = drafts.tokens[0, :2].tolist()
        for slot, tokens in ((0, taken), (2, [50, 60])):
            world.emit(slot, tokens)
            world.hybrid.observe(slot, tokens)
    assert world.tokens[0][-4:] == [12, 13, 14, 15] and not world.arbiter.asked
    world.hybrid.chain = True
    world.chain.bind(world.tables)
    world.hybrid.resume([0, 2], [world.tokens[0], world.tokens[2]], seen)
    drafts = world.draft([0, 2], [4, 4], 4)
    for row, slot in enumerate((0, 2)):
        assert drafts.tokens[row].tolist() == greedy(reference, world.tokens[slot], 4)


def test_q_is_a_point_mass_where_a_row_copied(model: Any) -> None:
    world = Hybrid(model, {0: REPEAT, 2: NEW}, "ratio")
    drafts = world.draft([0, 2], [4, 4], 4, temperature=1.0)
    assert drafts.probs is not None and torch.isfinite(drafts.probs).all()
    of_tokens = drafts.probs.gather(2, drafts.tokens[:, :, None])[:, :, 0]
    assert of_tokens[0].tolist() == [1.0] * 4 and (of_tokens[1] < 1.0).all()
    assert drafts.probs.sum(2) == pytest.approx(torch.ones(2, 4), abs=1e-5)


def test_a_sampler_copies_between_begin_and_end_only() -> None:
    q = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    drawn = torch.tensor([0, 1])
    sampler = CopyingSampler(lambda *_: (drawn, q.clone()))
    nothing: Any = None
    sampler.begin(torch.tensor([[2, 0], [2, 0]]), torch.tensor([[True, False], [False, False]]))
    tokens, mass = sampler(nothing, nothing, nothing, None)
    assert tokens.tolist() == [2, 1] and mass is not None and mass.tolist() == [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    tokens, mass = sampler(nothing, nothing, nothing, None)
    assert tokens.tolist() == [0, 1] and mass is not None and torch.equal(mass, q)
    sampler.end()
    assert sampler(nothing, nothing, nothing, None)[0] is drawn


def test_the_host_looks_once_for_a_match_until_it_knows_more() -> None:
    class Looks(SuffixDrafter):
        looks = 0

        def match(self, slot: int, num_tokens: int) -> Match:
            self.looks += 1
            return super().match(slot, num_tokens)

    class Chain:
        feature_layers = ()
        sampler = None

        def __getattr__(self, name: str) -> Any:
            return lambda *args: None

    suffix = Looks()
    drafter = HybridDeviceDrafter(suffix, Chain(), 5)  # type: ignore[arg-type]
    drafter.admit(0, REPEAT, 5)
    assert drafter.foreseen() == [], "while the prompt runs nobody waits for an index over it"
    drafter.observe(0, [12])
    assert [match.name for match in drafter.foreseen()] == ["output:5-8"]
    drafter.upload([0], [3], 3)
    assert suffix.looks == 1
    drafter.observe(0, [13])
    drafter.upload([0], [0], 3)
    drafter.foreseen()
    assert suffix.looks == 2
    drafter.release(0)
    assert drafter.foreseen() == []


def test_origins_name_every_class() -> None:
    for place, name in enumerate(CLASS_NAMES):
        assert HybridDeviceDrafter.origin_of(place << 8 | 15) == (name, 15)
        assert HybridDeviceDrafter.origin_of(place << 8) == (LEARNED, 0)
