"""Prompt chunks padded to tiers, as CUDA graphs need them, say what they say unpadded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from draft_models.eagle3_chain import ChainShape
from draft_models.small_lm_device import SmallLMDeviceDrafter
from server.core import RowPlan
from server.engine.gpu.prefill import Chunks, Layout, inputs_in
from server.engine.gpu.prompt_graphs import PromptGraphs
from server.engine.gpu.runner import GpuRunner
from server.engine.sequence import Sequence
from server.models.paged_forward import TorchForward
from tests.engine.tiny import BLOCK_SIZE, engine, prompts, request, run

LENGTH = 16
TIERS = (3, 8, 20, 64)


def late(model: Any, drafter: str = "none", **options: Any) -> Any:
    return engine(model, drafter, overlapped=True, **{"prompt_tiers": TIERS, **options})


def gpu(core: Any) -> GpuRunner:
    assert isinstance(core.runner, GpuRunner)
    return core.runner


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tiers that chunks are padded to."""
    seen: list[int] = []
    forward = PromptGraphs._forward

    def counted(self: PromptGraphs, tier: int, layers: tuple[int, ...]) -> None:
        seen.append(tier)
        forward(self, tier, layers)

    monkeypatch.setattr(PromptGraphs, "_forward", counted)
    return seen


@pytest.mark.parametrize("budget", [1, 3, 7, 20, 64])
@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_greedy(
    model: Any, greedy: Any, padded: list[int], drafter: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(PromptGraphs, "_run_eagerly")  # every chunk has its tier
    batch = prompts(8)
    answers = run(
        late(model, drafter, budget=budget, prefix_cache=False),
        [request(f"r{i}", p, LENGTH) for i, p in enumerate(batch)],
    )
    for i, prompt in enumerate(batch):
        assert answers[f"r{i}"] == greedy(prompt, LENGTH), f"request {i}"
    assert padded and set(padded) <= set(TIERS)


def test_prefix_hits(model: Any, greedy: Any, padded: list[int]) -> None:
    core = late(model, "suffix")
    first = prompts(1, low=20, high=21)[0]
    for batch in ([first], [first], [[*first[:-1], 5], first, first[:9]]):
        answers = run(core, [request(f"r{i}", p, LENGTH) for i, p in enumerate(batch)])
        assert [answers[f"r{i}"] for i in range(len(batch))] == [greedy(p, LENGTH) for p in batch]
    assert core.stats().num_cached_tokens > 0
    assert padded[0] == 20 and min(padded) < 20  # what a hit leaves is short


def test_what_no_tier_holds_runs_eagerly_and_is_not_missed(model: Any, greedy: Any, padded: list[int]) -> None:
    core = late(model, prompt_tiers=(3, 8))
    prompt = prompts(1, low=20, high=21)[0]
    assert run(core, [request("long", prompt, LENGTH)])["long"] == greedy(prompt, LENGTH)
    assert padded == [] and core.stats().num_graph_misses == 0
    assert run(core, [request("short", prompt[:8], LENGTH)])["short"] == greedy(prompt[:8], LENGTH)
    assert padded == [8]


def test_more_rows_than_a_graph_has(model: Any, greedy: Any, padded: list[int]) -> None:
    core = late(model)
    gpu(core).executor.prompts.max_rows = 2
    batch = [prompt[:5] for prompt in prompts(3)]
    answers = run(core, [request(f"r{i}", p, LENGTH) for i, p in enumerate(batch)])
    assert [answers[f"r{i}"] for i in range(3)] == [greedy(p, LENGTH) for p in batch]
    assert padded == []


@pytest.mark.parametrize("budget", [1, 64])
def test_scored_prompts_run_eagerly(model: Any, padded: list[int], budget: int) -> None:
    """Their logits are read when the next chunks may have run, even where they are no more than a graph could hold."""
    core = late(model, budget=budget)
    batch = [prompt[:6] for prompt in prompts(3)]
    answers = run(core, [request(f"r{i}", p, 4, prompt_logprobs=1) for i, p in enumerate(batch)])
    assert padded == []
    assert any(o.prompt_logprobs for o in answers.outputs)


def sequences(*lengths: int) -> tuple[list[RowPlan], list[Sequence]]:
    rows, owners = [], []
    for i, length in enumerate(lengths):
        seq = Sequence.of(request(f"r{i}", [10 * (i + 1) + j for j in range(9)]))
        seq.slot, seq.blocks = 5 - i, [3 + 4 * i, 9 + 4 * i, 5 + 4 * i]
        rows.append(RowPlan(seq.slot, 9 - length, length, i != 1))
        owners.append(seq)
    return rows, owners


def test_chunks_fill_their_buffer_whatever_it_held() -> None:
    chunks = Chunks.of(*sequences(4, 1, 3))
    layout = Layout.of(11, 5, 5)
    buffer = np.full(layout.size, -7)
    chunks.fill(buffer, layout, 4, nobody=6)
    assert buffer[layout.token_ids].tolist() == [15, 16, 17, 18, 28, 36, 37, 38, 0, 0, 0]
    assert buffer[layout.positions].tolist() == [5, 6, 7, 8, 8, 6, 7, 8, 0, 0, 0]
    assert buffer[layout.places].tolist() == [37, 38, 39, 20, 36, 70, 71, 52, 0, 0, 0]
    assert buffer[layout.slots].tolist() == [5, 4, 3, 6, 6]
    assert buffer[layout.starts].tolist() == [5, 8, 6, 0, 0]
    assert buffer[layout.offsets].tolist() == [0, 4, 5, 8, 8, 8]
    assert buffer[layout.logits_at].tolist() == [3, 7, 0, 0, 0]
    assert all(part.start % 2 == 0 for part in (layout.positions, layout.places, layout.slots, layout.logits_at))


def test_views_of_a_padded_buffer(model: Any) -> None:
    state = gpu(late(model)).state
    chunks = Chunks.of(*sequences(4, 1, 3))
    for layout in (Layout.of(11, 5, 5), Layout.of(8, 3, 2)):
        packed = torch.zeros(layout.size, dtype=torch.int64)
        chunks.fill(packed.numpy(), layout, BLOCK_SIZE, 6)
        own = inputs_in(packed, layout, state, chunks)
        assert own.token_ids.tolist() == [15, 16, 17, 18, 28, 36, 37, 38]
        assert own.logits_at.tolist() == [3, 7]
        assert own.rows.offsets is not None and own.rows.offsets.tolist() == [0, 4, 5, 8]
        assert (own.rows.num_rows, own.rows.max_width, own.rows.max_context) == (3, 4, 9)
        whole = inputs_in(packed, layout, state)
        assert whole.rows.num_rows == len(whole.rows.starts) == len(packed[layout.slots])
        assert (whole.rows.max_width, whole.rows.max_context) == (len(whole.token_ids), state.max_context)


def test_start_up_touches_nobodys_block_only(model: Any) -> None:
    runner = gpu(late(model))
    for pool in runner.pools:
        pool[BLOCK_SIZE:].normal_()
    before = [pool.clone() for pool in runner.pools]
    known = runner.state.slots.num_tokens.clone()
    found = runner.executor.prompts
    assert len(found.warm_up_jobs()) == len(found.candidates) == 3
    for tier, width in ((16, 5), (16, 16), (64, 64)):
        found._stand_in(tier, width)
        with torch.no_grad():
            found._forward(tier, ())
    for pool, old in zip(runner.pools, before, strict=True):
        assert torch.equal(pool[BLOCK_SIZE:], old[BLOCK_SIZE:])
        assert bool(pool[:BLOCK_SIZE].isfinite().all())
    assert torch.equal(runner.state.slots.num_tokens, known)
    found._stand_in(64, 0)
    own = inputs_in(found._inputs.device, found._layout(64), runner.state)
    assert own.rows.offsets is not None and int(own.rows.offsets.max()) == 0  # nothing but padding
    assert set(own.rows.slots.tolist()) == {runner.shape.max_num_seqs}


@pytest.mark.parametrize("drafter", ["none", "suffix", "small-lm"])
def test_ragged_chunks_are_warmed_up_on_nobodys_block(
    model: Any, other_model: Any, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones too, though a row has room for less, and without any tiers, as in deterministic mode."""
    by_hand = None
    if drafter == "small-lm":
        sizes = ChainShape(num_slots=17, num_blocks=400, block_size=BLOCK_SIZE, max_draft_tokens=3)
        sampler: Any = None
        device = torch.device("cpu")
        forward = TorchForward(other_model)
        by_hand = SmallLMDeviceDrafter(forward, other_model.kv_layers, torch.float32, device, sizes, sampler)
    made: Any = by_hand or drafter
    runner = gpu(late(model, made, prompt_tiers=()))
    pools = [*runner.pools, *(by_hand.pools if by_hand else [])]
    for pool in pools:
        pool[BLOCK_SIZE:].normal_()
        pool[:BLOCK_SIZE] = 0.0
    before = [pool.clone() for pool in pools]
    known, history = runner.state.slots.num_tokens.clone(), runner.state.slots.history.clone()
    seen: list[tuple[int, int]] = []
    forwards = runner.program.forward

    def counted(token_ids: Any, pools: Any, rows: Any, *rest: Any) -> Any:
        seen.append((len(token_ids), rows.width))
        return forwards(token_ids, pools, rows, *rest)

    monkeypatch.setattr(runner.program, "forward", counted)
    most = 2 * runner.state.max_context + 5
    with torch.no_grad():
        for job in runner.executor.chunk_jobs(most):
            job()
    assert seen == [(16, 0), (most, 0)]
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool[BLOCK_SIZE:], old[BLOCK_SIZE:])
        assert bool(pool[:BLOCK_SIZE].isfinite().all()) and bool(pool[:BLOCK_SIZE].any())
    assert torch.equal(runner.state.slots.num_tokens, known)
    assert torch.equal(runner.state.slots.history, history)
    assert len(runner.executor.chunk_jobs(9)) == 1


def test_only_tiers_that_pay_are_taken(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu(late(model, prompt_tiers=(4096,))).executor.prompts
    found.tiers = ()
    found.choose()
    assert found.tiers == ()  # no graphs on a CPU
    monkeypatch.setattr(found.graphs, "enabled", True)
    for most in (0, 16, 200, 4096):
        asked: list[int] = []

        def pays(tier: int, most: int = most, asked: list[int] = asked) -> bool:
            asked.append(tier)
            return tier <= most

        monkeypatch.setattr(found, "_pays", pays)
        found.choose()
        assert found.tiers == tuple(tier for tier in found.candidates if tier <= most)
        assert len(asked) <= 4


@pytest.mark.parametrize(
    ("free", "launch_ms", "pays"), [(10_000, 1.0, True), (10_000, 0.0, False), (4_000, 1.0, False), (None, 1.0, False)]
)
def test_a_tier_must_be_fast_and_leave_room(
    model: Any, monkeypatch: pytest.MonkeyPatch, free: int | None, launch_ms: float, pays: bool
) -> None:
    """A graph of 16 tokens takes 1000 bytes, so a step of 64 takes 4000; a replay takes no time here."""
    runner = gpu(late(model))
    found, reserved = runner.executor.prompts, [0]
    forward = found._forward

    def greedy_for_memory(tier: int, layers: tuple[int, ...]) -> None:
        if free is None:
            raise torch.cuda.OutOfMemoryError
        reserved[0] += 1000
        with torch.no_grad():
            forward(tier, layers)

    monkeypatch.setattr(found, "_forward", greedy_for_memory)
    monkeypatch.setattr(found, "_launch_ms", lambda run: launch_ms)
    for name, value in {
        "empty_cache": None,
        "synchronize": None,
        "mem_get_info": (free, 1 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: reserved[0])
    assert found._pays(16) is pays


@pytest.mark.parametrize("room", [4, 3, 1])
def test_prompt_tiers_give_way_to_the_graphs_of_steps(model: Any, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Memory for `room` graphs of any kind; those of steps take one here."""
    executor = gpu(late(model)).executor
    held: list[Any] = []

    def captured(key: Any, run: Any) -> None:
        if len(held) == room:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        held.append(key)

    monkeypatch.setattr(executor.graphs, "capture", captured)
    monkeypatch.setattr(executor.graphs, "clear", held.clear)
    monkeypatch.setattr(executor, "tiers", (16,))
    monkeypatch.setattr(executor, "k_tiers", (0,))
    monkeypatch.setattr(executor, "_capture_pair", lambda *_: captured("step", None))
    executor.capture()
    assert executor.prompts.tiers == TIERS[: room - 1]
    assert [key[1] for key in held[:-1]] == list(reversed(TIERS[: room - 1])) and held[-1] == "step"
    room = 0
    with pytest.raises(RuntimeError, match="previous error"):
        executor.capture()
