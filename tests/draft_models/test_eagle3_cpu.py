"""EAGLE-3 on the CPU against a dense pass over the whole sequence, and against what runs inside a GPU's graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from draft_models import eagle3_backlog
from draft_models.eagle3_backlog import NOBODY
from server.spec.types import Drafts
from tests.draft_models.eagle3_cpu_world import CpuWorld, cpu_ready
from tests.draft_models.test_eagle3 import BLOCK_SIZE, ready
from tests.draft_models.test_eagle3_network import CONFIG

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def plain_steps(world: CpuWorld, slot: int, count: int) -> None:
    """Steps without drafts, while drafting is paused."""
    world.drafter.pause()
    for _ in range(count):
        world.verify(world.step([slot]), Drafts.none(1, CPU), [0])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_chain_is_the_dense_networks(k: int) -> None:
    world = cpu_ready({0: 9, 2: 17, 1: 1, 3: 6})
    drafts = world.drafter.draft(world.step([0, 2, 1, 3]), k)
    assert drafts.tokens.tolist() == [world.expected(slot, k) for slot in (0, 2, 1, 3)]
    assert drafts.probs is None and drafts.tokens.dtype == torch.int64
    assert drafts.num_valid.tolist() == drafts.num_valid_host == [k] * 4


def test_norm_before_residual() -> None:
    world = cpu_ready({2: 9}, config=replace(CONFIG, norm_before_residual=True))
    assert world.drafter.draft(world.step([2]), 4).tokens.tolist() == [world.expected(2, 4)]


@pytest.mark.parametrize("accepted", [0, 1, 3, 5])
def test_keys_and_values_of_drafts_are_rewritten_from_the_targets_features(accepted: int) -> None:
    world = cpu_ready({0: 6, 3: 13})
    for k in (5, 1, 4, 5):
        step = world.step([0, 3])
        drafts = world.drafter.draft(step, k)
        assert drafts.tokens.tolist() == [world.expected(slot, k) for slot in (0, 3)]
        world.check_pool(0)
        world.check_pool(3)
        world.verify(step, drafts, [min(accepted, k), k - min(accepted, k)])


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_are_those_of_the_gpus_drafter(rule: str, temperature: float) -> None:
    """Token for token, step after step, and with the same distributions: the same sequences run through both."""
    cpu, gpu = cpu_ready({0: 9, 2: 14, 3: 5}, rule=rule), ready({0: 9, 2: 14, 3: 5}, rule=rule)
    cpu.temperature = temperature
    slots = [3, 0, 2]
    for k, accepted in ((4, [1, 0, 4]), (5, [0, 5, 2]), (1, [1, 0, 1]), (3, [2, 2, 0])):
        steps = [world.step(slots, temperature=temperature) for world in (cpu, gpu)]
        mine, theirs = cpu.drafter.draft(steps[0], k), gpu.drafter.draft(steps[1], k)
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        if rule == "ratio" and temperature > 0:
            assert mine.probs is not None and theirs.probs is not None
            torch.testing.assert_close(mine.probs, theirs.probs, rtol=1e-4, atol=1e-6)
        else:
            assert mine.probs is None
        cpu.verify(steps[0], mine, accepted)
        gpu.verify(steps[1], theirs, accepted)
        assert cpu.tokens == gpu.tokens


@pytest.mark.parametrize("limits", [[3, 0, 1, 5], [0, 2, 5, 0], [1, 1, 1, 1], [0, 0, 0, 2]])
def test_rows_with_limits(limits: list[int]) -> None:
    """In any order; nothing is written behind what a row owns."""
    world = cpu_ready({0: 7, 1: 9, 2: 7, 3: 4})
    slots = [0, 2, 1, 3]
    before = world.cpu.pools[0].clone()
    step = world.step(slots, [max(1, n) for n in limits])
    step.limits = torch.tensor(limits)
    drafts = world.drafter.draft(step, 5)
    assert drafts.num_valid_host == limits and drafts.tokens.shape == (4, max(limits))
    written = torch.zeros(len(before), dtype=torch.bool)
    for r, (slot, limit) in enumerate(zip(slots, limits, strict=True)):
        assert drafts.tokens[r, :limit].tolist() == world.expected(slot, limit)
        at = torch.arange(len(world.tokens[slot]) + max(0, limit - 1))
        written[world.tables[slot, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE] = True
    written[:BLOCK_SIZE] = True  # nobody's
    torch.testing.assert_close(world.cpu.pools[0][~written], before[~written], rtol=0, atol=0)
    accepted = [min(1, limit) for limit in limits]
    world.verify(step, drafts, accepted)
    again = world.drafter.draft(world.step(slots), 2)
    assert again.tokens.tolist() == [world.expected(slot, 2) for slot in slots]


@pytest.mark.parametrize("chunks", [[4, 4, 4], [1] * 12, [3, 8, 1], [11, 1]])
def test_features_cross_prompt_chunks(chunks: list[int]) -> None:
    world = CpuWorld(1)
    for slot in (0, 2):
        world.admit(slot, 12)
    for size in chunks:
        world.prefill({0: size, 2: size}, padding=3)
    assert world.drafter.draft(world.step([2, 0]), 3).tokens.tolist() == [world.expected(s, 3) for s in (2, 0)]
    world.check_pool(0)
    world.check_pool(2)


def check_hit(world: CpuWorld, slot: int, first: int) -> None:
    """Chains of `slot` see the positions from `first` on."""
    assert world.cpu.backlog.tails[slot].first == first
    assert world.drafter.draft(world.step([slot]), 3).tokens.tolist() == [world.expected(slot, 3, first)]


def share(world: CpuWorld, slot: int, of: int, num_blocks: int, length: int) -> None:
    """`slot` gets a prompt that begins like the tokens of slot `of`, whose first blocks it hits."""
    world.admit(slot, length)
    shared = num_blocks * BLOCK_SIZE
    world.tokens[slot][:shared] = world.tokens[of][:shared]
    world.features[slot] = world.features[of][:shared].clone()
    world.tables[slot, :num_blocks] = world.tables[of, :num_blocks]
    world.cpu.admit(slot, world.tokens[slot], length)


@pytest.mark.parametrize("generated", [False, True])
def test_a_prefix_hit_takes_its_features_from_the_block(generated: bool) -> None:
    world = cpu_ready({0: 5 if generated else 11})
    while generated and len(world.tokens[0]) < 12:
        step = world.step([0])
        world.verify(step, world.drafter.draft(step, 3), [2])
    if generated:
        world.drafter.draft(world.step([0]), 1)
    before = world.cpu.pools[0].clone()
    share(world, 2, 0, 2, 13)
    world.prefill({2: 5})
    assert world.drafter.draft(world.step([2]), 4).tokens.tolist() == [world.expected(2, 4)]
    world.check_pool(2)
    for block in world.tables[0, :2].tolist():
        part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        torch.testing.assert_close(world.cpu.pools[0][part], before[part], rtol=0, atol=0)


@pytest.mark.parametrize("accepted", range(6))
def test_blocks_that_an_answer_leaves_are_whole(accepted: int) -> None:
    """Its last tokens have not been drafted from yet when it ends."""
    world = cpu_ready({0: 6})
    step = world.step([0])
    world.verify(step, world.drafter.draft(step, 5), [accepted])
    ran = len(world.tokens[0]) - 1  # the last token has not gone through the target
    world.cpu.release(0, complete=True)
    world.cpu.pools[0][world.tables[0, 3] * BLOCK_SIZE :][:BLOCK_SIZE] = torch.nan
    share(world, 2, 0, ran // BLOCK_SIZE, 20)
    world.prefill({2: 20 - ran // BLOCK_SIZE * BLOCK_SIZE})
    assert world.drafter.draft(world.step([2]), 4).tokens.tolist() == [world.expected(2, 4)]
    world.check_pool(2)


@pytest.mark.parametrize("length", [1, 6, 40])
def test_a_pause_costs_no_context(length: int) -> None:
    world = cpu_ready({0: 9, 3: 4})
    step = world.step([0])
    world.verify(step, world.drafter.draft(step, 3), [1])
    before = world.cpu.pools[0].clone()
    plain_steps(world, 0, length)
    assert torch.equal(world.cpu.pools[0], before), "it does not run"
    drafts = world.drafter.draft(world.step([3, 0]), 3)
    assert drafts.tokens.tolist() == [world.expected(3, 3), world.expected(0, 3)]
    world.check_pool(0)


def test_a_prompt_that_comes_in_a_pause() -> None:
    world = CpuWorld(2)
    world.admit(1, 12)
    world.admit(2, 7)
    world.drafter.pause()
    world.prefill({1: 5, 2: 7})
    plain_steps(world, 2, 2)
    world.drafter.paused = False
    world.prefill({1: 7})  # drafting goes on in the middle of a prompt
    assert world.drafter.draft(world.step([1, 2]), 4).tokens.tolist() == [world.expected(1, 4), world.expected(2, 4)]
    world.check_pool(1)
    world.check_pool(2)


@pytest.mark.parametrize("chunk", [1, 3, 10, 25])
def test_a_long_pause_leaves_what_is_kept(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle3_backlog, "REACH", 10)
    world = CpuWorld(3)
    world.admit(0, 30)
    world.prefill({0: 5})
    world.drafter.pause()
    while len(world.features[0]) < 30:
        world.prefill({0: min(chunk, 30 - len(world.features[0]))})
    tail = world.cpu.backlog.tails[0]
    assert tail.count <= 10 and tail.first == tail.done == 31 - tail.count, "as far back as features are kept"
    assert tail.count >= 5
    for _ in range(3):
        step = world.step([0])
        drafts = world.drafter.draft(step, 3)
        assert drafts.tokens.tolist() == [world.expected(0, 3, tail.first)]
        world.check_pool(0, tail.first)
        world.verify(step, drafts, [1])


def test_blocks_that_changed_hands_in_a_pause_are_not_relied_on() -> None:
    """Slot 0's blocks go to another's tokens while nothing is drafted, and are hit by a third."""
    world = cpu_ready({0: 11})
    world.cpu.release(0, complete=True)
    world.drafter.pause()
    world.admit(0, 12)
    world.prefill({0: 12})
    plain_steps(world, 0, 3)
    share(world, 2, 0, 2, 13)
    world.prefill({2: 5})
    world.cpu.release(0, complete=True)
    check_hit(world, 2, 9)  # position 8 takes features that are not known


def test_blocks_that_changed_hands_unnoticed_are_not_relied_on() -> None:
    """Nobody told the drafter: the tokens are others than those it has written for."""
    world = cpu_ready({0: 11})
    world.admit(2, 13)
    world.tables[2, :2] = world.tables[0, :2]
    world.features[2] = world.normal(8, 3 * CONFIG.hidden_size)
    world.prefill({2: 5})
    check_hit(world, 2, 9)
    share(world, 3, 2, 3, 15)  # slot 2's own block lacks position 8: it is of no use either
    world.prefill({3: 3})
    check_hit(world, 3, 13)


def test_a_block_that_another_has_begun_is_not_relied_on() -> None:
    world = cpu_ready({0: 11})
    world.admit(3, 3)
    world.tables[3, 0] = world.tables[0, 0]
    world.prefill({3: 3})
    share(world, 2, 0, 2, 13)
    world.prefill({2: 5})
    check_hit(world, 2, 4)


def test_a_hit_counts_from_behind_what_is_missing() -> None:
    world = cpu_ready({0: 17})
    world.cpu.backlog._owner[int(world.tables[0, 1])] = NOBODY
    share(world, 2, 0, 4, 19)
    world.prefill({2: 3})
    check_hit(world, 2, 8)


def test_tokens_that_were_not_shown() -> None:
    world = cpu_ready({0: 9})
    world.tokens[0] += [5, 6, 7]
    world.features[0] = torch.cat([world.features[0], world.normal(3, 3 * CONFIG.hidden_size)])
    world.cpu.observe(0, [5, 6, 7])
    world.sync(0)
    world.verify(world.step([0]), Drafts.none(1, CPU), [0])
    drafts = world.drafter.draft(world.step([0]), 2)
    assert drafts.tokens.tolist() == [world.expected(0, 2, first=13)]


def test_a_slot_without_features_gets_no_drafts() -> None:
    world = cpu_ready({0: 9})
    world.admit(3, 5)
    world.sync(3)
    drafts = world.drafter.draft(world.step([3, 0]), 2)
    assert drafts.num_valid_host == [0, 2]
    assert drafts.tokens[1].tolist() == world.expected(0, 2)
    assert world.drafter.draft(world.step([3]), 2).num_valid_host == [0]


def test_broken_features_do_not_reach_the_pool() -> None:
    world = cpu_ready({0: 6})
    world.drafter.draft(world.step([0]), 1)
    world.verify(world.step([0]), Drafts(torch.tensor([[1]]), torch.tensor([1]), [1]), [1])
    world.cpu.backlog.waiting(0)[-1] = torch.nan
    world.cpu.release(0)
    assert bool(world.cpu.pools[0].isfinite().all())


def test_sampled_chains_of_filtered_rows() -> None:
    """Drafts come from what the filters leave: with top_k 1 they are the greedy ones at any temperature."""
    from server.core import SamplingParams
    from server.sampling.state import SamplingBatch

    for rule in ("coupled", "ratio"):
        world = cpu_ready({0: 9, 1: 14}, rule=rule)
        params = [SamplingParams(temperature=5.0, seed=1, top_k=1), SamplingParams(temperature=0.0)]

        def sampling(_: Any, chosen: Any = params) -> SamplingBatch:
            return SamplingBatch.of(chosen, CONFIG.vocab_size)

        world.sampling = sampling  # type: ignore[method-assign, assignment]
        drafts = world.drafter.draft(world.step([0, 1]), 3)
        assert drafts.tokens.tolist() == [world.expected(0, 3), world.expected(1, 3)]
        if rule == "ratio":
            assert drafts.probs is not None
            mass: Tensor = drafts.probs.gather(2, drafts.tokens[:, :, None])
            torch.testing.assert_close(mass, torch.ones_like(mass))
