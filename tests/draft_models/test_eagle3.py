"""The EAGLE-3 drafter on paged tensors against a dense pass of the same network over the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import random_weights
from server.kernels.paged import PagedRows
from server.sampling.rng import TARGET, gumbel, noise_keys
from server.spec.device import CachedDrafts, DeviceStep
from server.spec.types import Drafts, SlotState, Verdict
from tests.draft_models.sampling_tables import sampling_tables
from tests.draft_models.test_eagle3_network import CONFIG, HIDDEN, Dense, best

BLOCK_SIZE = 4
NUM_BLOCKS = 64
NUM_SLOTS = 5
MAX_DRAFTS = 5
PADDING = NUM_SLOTS - 1


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


class World:
    """Sequences in slots with shuffled blocks, and the target: features are random, one row a token."""

    def __init__(self, seed: int = 0, config: Any = CONFIG, rule: str = "coupled") -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.config = config
        embedding = self.normal(config.vocab_size, config.hidden_size)
        weights = random_weights(config, seed)
        for name in ("fc", "hidden_norm", "input_layernorm", "post_attention_layernorm", "norm"):
            weights_of = getattr(weights, name)
            weights_of.mul_(1.0 + 0.3 * self.normal(*weights_of.shape))
        self.dense = Dense(weights, embedding, config)
        network = Eagle3Network(config, weights, embedding, 256)
        shape = ChainShape(NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_DRAFTS)
        self.drafter = Eagle3Drafter(network, shape, TorchSampler(config.vocab_size, rule))
        self.state = SlotState(
            history=torch.randint(0, config.vocab_size, (NUM_SLOTS, 100), generator=self.random),
            num_tokens=torch.ones(NUM_SLOTS, dtype=torch.int64),
            prompt_len=torch.ones(NUM_SLOTS, dtype=torch.int64),
        )
        self.tables = torch.zeros(NUM_SLOTS, 26, dtype=torch.int32)
        order = torch.randperm(NUM_BLOCKS - 1, generator=self.random) + 1
        for slot in range(PADDING):
            self.tables[slot, :15] = order[slot * 15 : slot * 15 + 15]
        self.drafter.pools[0].copy_(self.normal(*self.drafter.pools[0].shape))  # what earlier owners left
        self.tokens: dict[int, list[int]] = {}
        self.features: dict[int, Tensor] = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def admit(self, slot: int, length: int, hit: tuple[int, int] = (0, 0)) -> None:
        """`hit`: what blocks of a prefix hit bring: the first token that the drafter can use, and their tokens."""
        self.tokens[slot] = torch.randint(0, self.config.vocab_size, (length,), generator=self.random).tolist()
        self.features[slot] = torch.zeros(0, 3 * self.config.hidden_size)
        last_block = self.tables[slot, max(hit[1] // BLOCK_SIZE - 1, 0)].long()
        cached = CachedDrafts(*(torch.tensor([value]) for value in (*hit, int(last_block))))
        self.drafter.admit_slots(torch.tensor([slot]), torch.tensor([length]), cached)

    def step(self, slots: list[int], limits: list[int] | None = None, temperature: float = 0.0) -> DeviceStep:
        rows = len(slots)
        return DeviceStep(
            slots=torch.tensor(slots),
            limits=torch.tensor(limits or [MAX_DRAFTS] * rows),
            state=self.state,
            block_tables=self.tables,
            **sampling_tables(PADDING + 1, temperature),
            uploads=None,
            max_context=max([len(self.tokens[s]) for s in slots if s != PADDING] + [1]),
            block_size=BLOCK_SIZE,
        )

    def prefill(self, chunks: dict[int, int], padding: int = 0, seen: bool = True) -> None:
        """Runs the next `chunks[slot]` prompt tokens of each slot in one ragged step, which the drafter has `seen`."""
        starts = {slot: len(self.features[slot]) for slot in chunks}
        for slot, length in chunks.items():
            self.features[slot] = torch.cat([self.features[slot], self.normal(length, 3 * self.config.hidden_size)])
        ids = [t for s, n in chunks.items() for t in self.tokens[s][starts[s] : starts[s] + n]]
        lengths = torch.tensor(list(chunks.values()))
        rows = PagedRows(
            slots=torch.tensor(list(chunks)),
            starts=torch.tensor(list(starts.values())),
            block_tables=self.tables,
            block_size=BLOCK_SIZE,
            max_context=64,
            offsets=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            max_width=max(chunks.values()),
        )
        features = torch.cat([self.features[s][starts[s] :] for s in chunks])
        features = F.pad(features, (0, 0, 0, padding), value=3.0)
        if seen:
            self.drafter.prefill_chunk(self.step(list(chunks)), torch.tensor(ids + [5] * padding), rows, features)
        for slot in chunks:
            if len(self.features[slot]) == len(self.tokens[slot]):
                self.tokens[slot].append(slot + 3)  # the target's first token
                self.sync(slot)

    def sync(self, slot: int) -> None:
        known = self.tokens[slot]
        self.state.history[slot, : len(known)] = torch.tensor(known)
        self.state.num_tokens[slot] = len(known)

    def verify(self, step: DeviceStep, drafts: Drafts, accepted: list[int], seen: bool = True) -> None:
        """The target takes the first `accepted[r]` drafts of each row and says something of its own."""
        num_rows, k = drafts.tokens.shape
        features = self.normal(num_rows, 1 + k, 3 * self.config.hidden_size)
        tokens = torch.cat([drafts.tokens, torch.zeros(num_rows, 1, dtype=torch.int64)], dim=1)
        for r, slot in enumerate(step.slots.tolist()):
            if slot == PADDING:
                continue
            n = accepted[r]
            tokens[r, n] = (int(tokens[r, n]) + 1) % self.config.vocab_size
            self.tokens[slot] += tokens[r, : n + 1].tolist()
            self.features[slot] = torch.cat([self.features[slot], features[r, : n + 1]])
            self.sync(slot)
        emitted = torch.tensor(accepted) + 1
        if seen:
            self.drafter.after_verify(step, drafts, Verdict(tokens, emitted - 1, emitted), features)

    def plain(self, slot: int, seen: bool) -> None:
        """A step without drafts."""
        self.verify(self.step([slot]), Drafts.none(1, torch.device("cpu")), [0], seen)

    def check_pool(self, slot: int, start: int = 0) -> None:
        """Keys and values of all known tokens but the last are those of the target's features."""
        tokens = self.tokens[slot][:-1]
        _, k, v = self.dense.projected(tokens, self.dense.inputs(self.features[slot][: len(tokens) - 1]))
        pairs = k.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # halves -> side by side
        at = torch.arange(len(tokens))
        places = self.tables[slot, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        found = self.drafter.pools[0][places]
        torch.testing.assert_close(found[start:], torch.cat([pairs, v], dim=1)[start:], rtol=1e-4, atol=1e-5)

    def expected(self, slot: int, k: int, first: int = 0) -> list[int]:
        return self.dense.chain(self.tokens[slot], self.features[slot], k, best, first)


def ready(lengths: dict[int, int], seed: int = 0, **kind: Any) -> World:
    """Every prompt prefilled whole."""
    world = World(seed, **kind)
    for slot, length in lengths.items():
        world.admit(slot, length)
    world.prefill(lengths)
    return world


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_chain_is_the_dense_networks(k: int) -> None:
    world = ready({0: 9, 2: 17, 1: 1})
    drafts = world.drafter.draft(world.step([0, 2, 1]), k)
    assert drafts.tokens.tolist() == [world.expected(slot, k) for slot in (0, 2, 1)]
    assert drafts.probs is None and drafts.tokens.dtype == torch.int64


def test_norm_before_residual() -> None:
    world = ready({0: 9}, config=replace(CONFIG, norm_before_residual=True))
    assert world.drafter.draft(world.step([0]), 4).tokens.tolist() == [world.expected(0, 4)]


@pytest.mark.parametrize("accepted", [0, 1, 3, 5])
def test_keys_and_values_of_drafts_are_rewritten_from_the_targets_features(accepted: int) -> None:
    world = ready({0: 6, 3: 13})
    for k in (5, 1, 4):  # a short chain after a long one rewrites all of it
        step = world.step([0, 3])
        drafts = world.drafter.draft(step, k)
        assert drafts.tokens.tolist() == [world.expected(slot, k) for slot in (0, 3)]
        world.check_pool(0)
        world.check_pool(3)
        world.verify(step, drafts, [min(accepted, k), k - min(accepted, k)])


def test_long_answers_run_round_the_ring() -> None:
    world = ready({1: 3})
    for i in range(12):
        step = world.step([1])
        drafts = world.drafter.draft(step, 3)
        assert drafts.tokens.tolist() == [world.expected(1, 3)]
        world.check_pool(1)
        world.verify(step, drafts, [i % 4])


@pytest.mark.parametrize("chunks", [[4, 4, 4], [1] * 12, [3, 8, 1], [11, 1]])
def test_features_cross_prompt_chunks(chunks: list[int]) -> None:
    world = World(1)
    for slot in (0, 2):
        world.admit(slot, 12)
    for size in chunks:
        world.prefill({0: size, 2: size}, padding=3)
    world.check_pool(0)
    world.check_pool(2)
    assert world.drafter.draft(world.step([2, 0]), 3).tokens.tolist() == [world.expected(s, 3) for s in (2, 0)]


@pytest.mark.parametrize("generated", [False, True])
def test_a_prefix_hit_takes_its_features_from_the_block(generated: bool) -> None:
    """Slot 2 shares slot 0's first two blocks and prefills only what follows."""
    world = ready({0: 5 if generated else 11})
    while generated and len(world.tokens[0]) < 12:
        step = world.step([0])
        world.verify(step, world.drafter.draft(step, 3), [2])
    if generated:
        world.drafter.draft(world.step([0]), 1)  # the last window's keys and values come with the next chain
    shared = 2 * BLOCK_SIZE
    world.tables[2, :2] = world.tables[0, :2]
    world.admit(2, 13, (0, shared))
    world.tokens[2][:shared] = world.tokens[0][:shared]
    world.features[2] = world.features[0][:shared].clone()
    before = world.drafter.pools[0].clone()
    world.prefill({2: 5})
    assert world.drafter.draft(world.step([2]), 4).tokens.tolist() == [world.expected(2, 4)]
    world.check_pool(2)
    for block in world.tables[0, :2].tolist():
        part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        torch.testing.assert_close(world.drafter.pools[0][part], before[part], rtol=0, atol=0)


def test_a_slot_that_changed_hands_starts_anew() -> None:
    world = ready({0: 21})
    world.plain(0, seen=False)
    step = world.step([0])
    world.verify(step, world.drafter.draft(step, 5), [5])
    world.drafter.release(0, complete=True)
    world.drafter.ring.ring[0] = torch.nan  # the owner's answer broke down
    world.drafter.observe(0, [1])
    world.admit(0, 2)
    world.prefill({0: 2})
    assert world.drafter.draft(world.step([0]), 4).tokens.tolist() == [world.expected(0, 4)]
    assert bool(world.drafter.pools[0].isfinite().all())


def test_limits_and_padding_rows() -> None:
    world = ready({0: 9, 1: 4})
    drafts = world.drafter.draft(world.step([0, 1, PADDING, PADDING], [3, 0, 0, 0]), 3)
    assert drafts.num_valid.tolist() == [3, 0, 0, 0]
    assert drafts.tokens[0].tolist() == world.expected(0, 3)
    assert drafts.tokens[1, 0] == world.expected(1, 1)[0]
    assert bool(((drafts.tokens >= 0) & (drafts.tokens < CONFIG.vocab_size)).all()), "valid ids everywhere"
    world.verify(world.step([0, 1, PADDING, PADDING]), drafts, [2, 0, 1, 0])
    after = world.drafter.draft(world.step([1, 0, PADDING]), 2)
    assert after.tokens[:2].tolist() == [world.expected(slot, 2) for slot in (1, 0)]
    for tensor in (world.drafter.pools[0], world.drafter.ring.ring, world.drafter.ring.by_block):
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize("missed", [1, MAX_DRAFTS + 5])
@pytest.mark.parametrize("shown", [1, 3, MAX_DRAFTS + 3])
def test_after_a_pause_chains_see_what_was_shown_again(missed: int, shown: int) -> None:
    """Steps that the drafter was not shown change nothing of its; what it drafts from is right all the same."""
    world = ready({0: 9, 1: 5})
    step = world.step([0])
    world.verify(step, world.drafter.draft(step, 3), [1])
    world.drafter.pause()
    before = [tensor.clone() for tensor in (world.drafter.pools[0], world.drafter.ring.ring, world.drafter.ring.marks)]
    for _ in range(missed):
        world.plain(0, seen=False)
    after = (world.drafter.pools[0], world.drafter.ring.ring, world.drafter.ring.marks)
    for old, tensor in zip(before, after, strict=True):
        assert torch.equal(old, tensor)
    for _ in range(shown):
        world.plain(0, seen=True)
    first = len(world.tokens[0]) - min(shown, MAX_DRAFTS + 1)
    for accepted in (1, 2, 0, 3, 3):
        step = world.step([0, 1])
        drafts = world.drafter.draft(step, 3)
        assert drafts.tokens.tolist() == [world.expected(0, 3, first), world.expected(1, 3)]
        world.check_pool(0, first)
        world.verify(step, drafts, [accepted, 1])


def test_a_chain_right_behind_tokens_that_were_missed_starts_from_the_last_one_alone() -> None:
    """Then from what came after it. The keys and values of that token are not taken for right."""
    world = ready({0: 9})
    world.drafter.draft(world.step([0]), 3)
    world.plain(0, seen=False)
    world.plain(0, seen=False)
    step = world.step([0])
    drafts = world.drafter.draft(step, 3)
    assert bool(((drafts.tokens >= 0) & (drafts.tokens < CONFIG.vocab_size)).all())
    known = len(world.tokens[0])
    world.verify(step, drafts, [2])
    for accepted in (0, 3, 1):
        step = world.step([0])
        drafts = world.drafter.draft(step, 3)
        assert drafts.tokens.tolist() == [world.expected(0, 3, known)]
        world.check_pool(0, known)
        world.verify(step, drafts, [accepted])


def test_a_few_plain_steps_that_were_shown_cost_nothing() -> None:
    world = ready({0: 9})
    for _ in range(MAX_DRAFTS):
        world.plain(0, seen=True)
    assert world.drafter.draft(world.step([0]), 3).tokens.tolist() == [world.expected(0, 3)]


@pytest.mark.parametrize("seen", [(True, False, True), (False, True, True), (False, False, True), (True, True, False)])
def test_prompt_chunks_that_came_in_a_pause(seen: tuple[bool, ...]) -> None:
    """Attention begins behind the first token after the last gap, whose own features nobody has."""
    world = World(3)
    world.admit(0, 12)
    starts = [0, 4, 7]
    for size, shown in zip((4, 3, 5), seen, strict=True):
        world.prefill({0: size}, seen=shown)
    if not seen[-1]:
        first = 13
        world.plain(0, seen=True)
    else:
        first = starts[max(i for i, shown in enumerate(seen) if not shown) + 1] + 1
        world.check_pool(0, first)
    for accepted in (2, 0, 1):
        step = world.step([0])
        drafts = world.drafter.draft(step, 3)
        assert drafts.tokens.tolist() == [world.expected(0, 3, first)]
        world.verify(step, drafts, [accepted])


@pytest.mark.parametrize("usable", [0, 4, 8])
@pytest.mark.parametrize("left", [1, 5])
def test_a_prefix_hit_whose_blocks_do_not_all_serve_the_drafter(usable: int, left: int) -> None:
    """`usable` is where its keys and values begin; 8: nowhere in the hit. With one token left there is no chunk."""
    world = ready({0: 11})
    world.tables[2, :2] = world.tables[0, :2]
    world.admit(2, 8 + left, (usable, 8))
    world.tokens[2][:8] = world.tokens[0][:8]
    world.features[2] = world.features[0][:8].clone()
    if usable:
        world.drafter.pools[0].view(NUM_BLOCKS, -1)[world.tables[2, : usable // BLOCK_SIZE].long()] = 7.0
    if usable == 8:
        world.drafter.ring.by_block[world.tables[2, 1]] = torch.nan
    first = usable
    if left > 1:
        world.prefill({2: left})
        first = 9 if usable == 8 else usable
    else:
        world.sync(2)
        first = 9 if usable == 8 else usable
    for accepted in (2, 0, 3):
        step = world.step([2])
        drafts = world.drafter.draft(step, 3)
        if accepted != 2 or left > 1 or usable < 8:  # else its first chain has nothing right to start from
            assert drafts.tokens.tolist() == [world.expected(2, 3, first)]
            world.check_pool(2, first)
        assert bool(world.drafter.pools[0].isfinite().all())
        world.verify(step, drafts, [accepted])


@pytest.mark.parametrize("limit", [0, 1])
def test_drafts_past_a_rows_limit_write_nothing(limit: int) -> None:
    """Behind a row's last block its table is stale: it names blocks that are others' by now."""
    world = ready({0: 7 - limit, 1: 9})
    world.tables[0, 2:4] = world.tables[1, :2]  # 8 places are slot 0's own
    pool, by_block = world.drafter.pools[0].clone(), world.drafter.ring.by_block.clone()
    step = world.step([0], [limit])
    drafts = world.drafter.draft(step, 5)
    assert drafts.tokens[0, : limit + 1].tolist() == world.expected(0, limit + 1)
    world.verify(step, drafts, [limit])
    assert not torch.equal(world.drafter.pools[0], pool)
    for block in world.tables[1, :2].tolist():
        part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        assert torch.equal(world.drafter.pools[0][part], pool[part])
        assert torch.equal(world.drafter.ring.by_block[block], by_block[block])
    world.tables[0, 2] = world.tables[2, 0]  # the row has got a block
    assert world.drafter.draft(world.step([0]), 3).tokens.tolist() == [world.expected(0, 3)]


def test_sampled_chains_use_the_targets_noise_at_target_ids() -> None:
    world = ready({0: 9, 1: 14})
    temperature = 0.8

    def pick(slot: int) -> Any:
        def drawn(logits: Tensor, position: int) -> int:
            keys = noise_keys(torch.tensor([slot + 7]), torch.tensor([0]), torch.tensor([position]), TARGET)
            noise = gumbel(keys, CONFIG.vocab_size)[0, world.dense.w.target_ids]
            return int((logits / temperature + noise).argmax())

        return drawn

    drafts = world.drafter.draft(world.step([0, 1], temperature=temperature), 4)
    for row, slot in enumerate((0, 1)):
        assert drafts.tokens[row].tolist() == world.dense.chain(world.tokens[slot], world.features[slot], 4, pick(slot))
    assert drafts.tokens.tolist() != world.drafter.draft(world.step([0, 1]), 4).tokens.tolist()


def test_rule_ratio_hands_over_the_distribution() -> None:
    world = ready({0: 9}, rule="ratio")
    drafts = world.drafter.draft(world.step([0], temperature=0.7), 3)
    assert drafts.probs is not None and drafts.probs.shape == (1, 3, CONFIG.vocab_size)
    torch.testing.assert_close(drafts.probs.sum(-1), torch.ones(1, 3))
    inputs = world.dense.inputs(world.features[0])
    logits = world.dense.logits(world.dense.hidden(world.tokens[0], inputs)[-1])
    torch.testing.assert_close(drafts.probs[0, 0, world.dense.w.target_ids], (logits / 0.7).softmax(-1))
    assert bool((drafts.probs.gather(2, drafts.tokens[:, :, None]) > 0).all())


class NoSync(TorchDispatchMode):
    """Fails on every operator that makes the host wait for the device, or whose shape depends on values."""

    FORBIDDEN = ("item", "local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "repeat_in")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.lstrip("_").startswith(self.FORBIDDEN), f"{name} synchronises"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean index synchronises"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NoSync, and what reads a CPU tensor's memory without asking the dispatcher."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor's values were read on the host")

    with monkeypatch.context() as patched, NoSync():  # type: ignore[no-untyped-call]
        for name in ("tolist", "numpy", "cpu", "__array__"):
            patched.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
def test_nothing_in_a_step_synchronises(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = ready({0: 9, 1: 5}, rule=rule)
    step = world.step([0, 1, PADDING], temperature=1.0)
    verdict = Verdict(torch.ones(3, 4, dtype=torch.int64), torch.tensor([1, 0, 0]), torch.tensor([2, 1, 1]))
    features = torch.zeros(3, 4, 3 * HIDDEN)
    rows = PagedRows(
        slots=torch.tensor([2]),
        starts=torch.tensor([0]),
        block_tables=world.tables,
        block_size=BLOCK_SIZE,
        max_context=6,
        offsets=torch.tensor([0, 6], dtype=torch.int32),
        max_width=6,
    )
    ids, chunk = torch.arange(6), torch.zeros(6, 3 * HIDDEN)
    with no_sync(monkeypatch):
        drafts = world.drafter.draft(step, 3)
        world.drafter.after_verify(step, drafts, verdict, features)
        world.drafter.prefill_chunk(step, ids, rows, chunk)


def test_the_check_above_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    for wait in (lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x[x > 0], lambda x: bool(x.any())):
        with no_sync(monkeypatch), pytest.raises(AssertionError):
            wait(torch.ones(3))


def test_what_a_cpu_step_asks_is_refused() -> None:
    world = ready({0: 9})
    with pytest.raises(ValueError, match="k: 6 is not valid; use 1 to 5"):
        world.drafter.draft(world.step([0]), 6)
    nothing: Any = None
    refused = pytest.raises(NotImplementedError, match="inside device steps")
    with refused:
        world.drafter.prefill(nothing, nothing, nothing, nothing, None)
    with refused:
        world.drafter.propose(nothing, 1, nothing)
    with refused:
        world.drafter.commit(nothing, nothing, nothing, None)
    assert world.drafter.upload_width(3) == 0 and world.drafter.upload([1, 2], [1, 1], 3) == [[], []]
