"""Cached blocks say whether they hold the drafter's keys and values: hits stay hits, drafts start from right ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.eagle3_config import config_for
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import random_weights
from draft_models.small_lm_device import SmallLMDeviceDrafter
from server.core import Phase, Request
from server.engine.core import EngineCore
from server.engine.draft_kv import CausalSpan, FeatureSpan, span_maker
from server.engine.speculation import Speculation
from server.engine.step_runner import RunnerShape
from server.models.loader import load_model
from server.models.paged_forward import TorchForward
from server.models.paging import Span, make_pools, ragged_batch
from tests.engine.tiny import (
    BLOCK_SIZE,
    Answers,
    Wavering,
    engine,
    make_drafter,
    request,
    run,
    save_loopy_llama,
)

K, NUM_BLOCKS, NUM_SEQS = 3, 400, 4


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four layers: an EAGLE-3 head fuses three."""
    path: Path = save_loopy_llama(tmp_path_factory.mktemp("deep"), 0, 4)
    raw = json.loads((path / "config.json").read_text())
    return load_model(path, raw, torch.device("cpu"), torch.float32, 256)


def overlapped(model: Any, drafter: str, speculation: Speculation | None = None) -> EngineCore:
    chain, sampler = ChainShape(NUM_SEQS + 1, NUM_BLOCKS, BLOCK_SIZE, K), TorchSampler(model.vocab_size, "coupled")
    made: Any = "none"
    if drafter == "eagle3":
        network = Eagle3Network(config_for(model.config, 32), random_weights(config_for(model.config, 32), 0),
                                model.embedding, 160)  # fmt: skip
        made = Eagle3Drafter(network, chain, sampler)
    elif drafter == "small-lm":
        made = SmallLMDeviceDrafter(TorchForward(model), model.kv_layers, torch.float32, model.device, chain, sampler)
    core = engine(model, made, K, max_num_seqs=NUM_SEQS, num_blocks=NUM_BLOCKS, overlapped=True)
    for pool in getattr(core.runner.drafter, "pools", []):
        pool[BLOCK_SIZE:].normal_()
    if speculation is not None:
        core.speculation = speculation
    return core


class Switched(Speculation):
    """Drafts or is paused, as the test says."""

    paused = False

    def __init__(self) -> None:
        super().__init__(None, K, False)

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        return 0 if self.paused else super().num_draft_tokens(num_rows, num_eligible)

    def follows(self, phase: Phase, num_rows: int) -> bool:
        return not self.paused


def turns(core: EngineCore, seed: int = 0) -> tuple[Answers, list[Answers]]:
    """Four conversations of three turns on one system prompt: all answers, and turn by turn."""
    draw = random.Random(seed)
    system = [draw.randrange(3, 60) for _ in range(11)]
    said = [system + [draw.randrange(3, 60) for _ in range(draw.randint(1, 9))] for _ in range(4)]
    rounds = []
    for turn in range(3):
        found = run(core, [request(f"{i}.{turn}", list(tokens), 14, ignore_eos=True) for i, tokens in enumerate(said)])
        for i, tokens in enumerate(said):
            tokens += found[f"{i}.{turn}"] + [draw.randrange(3, 60) for _ in range(draw.randint(1, 6))]
        rounds.append(found)
    return Answers([output for found in rounds for output in found.outputs]), rounds


def cached(answers: Answers) -> dict[str, int]:
    return {o.request_id: o.num_cached for o in answers.outputs if o.num_cached is not None}


@pytest.mark.parametrize("drafter", ["eagle3", "small-lm"])
@pytest.mark.parametrize("pausing", [False, True])
def test_the_same_hits_and_the_same_text_as_without_a_drafter(deep_model: Any, drafter: str, pausing: bool) -> None:
    expected, _ = turns(overlapped(deep_model, "none"))
    core = overlapped(deep_model, drafter, Wavering(K, 3, (K,)) if pausing else None)
    found, _ = turns(core)
    assert found == expected
    assert cached(found) == cached(expected)
    assert sum(cached(found).values()) == core.stats().num_cached_tokens > 200
    assert found.num_drafted > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pauses", [0.0, 0.3])
def test_marked_blocks_hold_what_the_head_makes_of_the_targets_features(
    deep_model: Any, seed: int, pauses: float
) -> None:
    """And nearly all are marked if nothing was paused: the last tokens of an answer wait for a step that never came."""
    core = overlapped(deep_model, "eagle3", Wavering(K, seed, (1, K), pauses))
    _, rounds = turns(core, seed)
    drafter: Any = core.runner.drafter
    marked = full = 0
    for name in rounds[-1]:
        # The last turn's prompt holds all that was said before.
        tokens = next(r for r in REQUESTS if r.request_id == name).prompt_ids + rounds[-1][name]
        blocks, _ = core.scheduler.cache.match(tokens, len(tokens))
        expected, behind = dense(deep_model, drafter, tokens)
        for i, block in enumerate(blocks):
            full += 1
            if core.scheduler.pool.is_drafted(block):
                marked += 1
                part, end = slice(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE), (i + 1) * BLOCK_SIZE
                places = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
                torch.testing.assert_close(drafter.pools[0][places], expected[part], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(drafter.ring.by_block[block], behind[end - 1], rtol=1e-3, atol=1e-3)
    assert marked >= 0.9 * full if pauses == 0.0 else 0 < marked < full


REQUESTS: list[Request] = []


@pytest.fixture(autouse=True)
def _keep_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    REQUESTS.clear()
    submit = EngineCore.submit

    def kept(self: EngineCore, req: Request) -> Any:
        REQUESTS.append(req)
        return submit(self, req)

    monkeypatch.setattr(EngineCore, "submit", kept)


def dense(model: Any, drafter: Any, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the head, and fused features, of all tokens in one pass."""
    with torch.inference_mode():
        count = len(tokens)
        blocks = list(range(1, count // BLOCK_SIZE + 2))
        size = (blocks[-1] + 1) * BLOCK_SIZE
        pools = make_pools(model.kv_layers, size, torch.float32, model.device)
        batch = ragged_batch([Span(0, count, blocks, True)], BLOCK_SIZE)
        ids = torch.tensor(tokens)
        _, features = model.forward(ids, pools, batch, torch.arange(1), drafter.feature_layers)
        fused = drafter.network.fuse(features)
        before = torch.cat([torch.zeros(1, fused.shape[1]), fused[:-1]])
        pool, at = torch.zeros(count, *drafter.pools[0].shape[1:]), torch.arange(count)
        drafter.network.remember(ids, before, at, at, pool)
        return pool, fused


@pytest.mark.parametrize("at", range(3, 15))
def test_the_row_that_an_ended_answer_still_has_writes_its_last_tokens(deep_model: Any, at: int) -> None:
    """Whatever the step accepted that a stop token ended: all full blocks serve the next turn."""
    prompt = [(5 * i) % 47 + 3 for i in range(10)]
    answer = run(engine(deep_model), [request("r", prompt, 20, ignore_eos=True)])["r"]
    core = overlapped(deep_model, "small-lm")
    found = run(core, [request("r", prompt, 40, ignore_eos=True, stop_token_ids=[answer[at]])])
    assert found["r"] == answer[: answer.index(answer[at]) + 1]
    tokens = prompt + found["r"]
    blocks, _ = core.scheduler.cache.match(tokens, len(tokens) - 1)
    assert len(blocks) == (len(tokens) - 1) // BLOCK_SIZE
    assert all(map(core.scheduler.pool.is_drafted, blocks))


@pytest.mark.parametrize("drafter", ["eagle3", "small-lm"])
def test_blocks_from_a_pause_are_hits_that_the_drafter_does_not_use(deep_model: Any, drafter: str) -> None:
    """The small LM, which is the target here, computes what they lack: its drafts are right at once."""
    switch = Switched()
    core = overlapped(deep_model, drafter, switch)
    prompt = [(7 * i) % 50 + 3 for i in range(24)]
    switch.paused = True
    first = run(core, [request("paused", prompt, 12, ignore_eos=True)])
    blocks, _ = core.scheduler.cache.match(prompt, len(prompt))
    assert len(blocks) == 6 and not any(map(core.scheduler.pool.is_drafted, blocks))
    assert first.num_drafted == 0
    switch.paused = False
    again = run(core, [request("again", [*prompt, 5], 40, ignore_eos=True)])
    assert cached(again)["again"] == 24
    assert [core.scheduler.pool.is_drafted(block) for block in blocks] == [drafter == "small-lm"] * 6
    if drafter == "small-lm":
        assert again.num_accepted > 0.9 * again.num_drafted > 0


def test_the_small_lm_of_a_cpu_runs_no_token_that_a_hit_has_brought(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = engine(model, "small-lm", 3, draft_model=model)
    drafter: Any = core.runner.drafter
    ran: list[int] = []
    forward = drafter._run

    def counted(carry: Any, parts: list[tuple[int, int, int]], tokens: Any) -> Any:
        ran.extend(length for _, _, length in parts)
        return forward(carry, parts, tokens)

    monkeypatch.setattr(drafter, "_run", counted)
    prompt = list(range(3, 36))
    expected = run(core, [request("first", prompt, 12, ignore_eos=True)])
    ran.clear()
    found = run(core, [request("second", prompt, 12, ignore_eos=True)])
    assert found["second"] == expected["first"]
    assert cached(found) == {"second": 32}
    assert found.num_accepted == found.num_drafted > 0
    assert sum(ran) < len(prompt)


# -- spans -------------------------------------------------------------------------------------------------


def test_a_heads_span_after_hits() -> None:
    def after(serves: list[bool]) -> FeatureSpan:
        return FeatureSpan.after_hit(4, serves, 8)

    assert (after([]).first, after([]).end, after([]).features_end) == (0, 0, 1)
    assert (after([True, True]).first, after([True, True]).end) == (0, 16)
    assert (after([True, False, True]).first, after([True, False, True]).features_end) == (16, 25)
    broken = after([True, False])
    assert (broken.first, broken.end, broken.features_end) == (16, 16, 0)
    broken.chunk(16, 24)
    assert (broken.first, broken.end) == (17, 24)
    assert not broken.holds(16, 24)
    broken.chunk(24, 40)
    assert broken.holds(24, 32) and broken.holds(32, 40)


def test_a_heads_span_from_step_to_step() -> None:
    span = FeatureSpan(4)
    span.chunk(0, 10)
    span.step(11, 3, drafted=True)
    assert (span.first, span.end) == (0, 11)
    assert span.holds(0, 8) and not span.holds(8, 12)
    span.step(14, 1, drafted=False)  # shown
    span.step(15, 2, drafted=True)
    assert (span.first, span.end) == (0, 15)
    span.step(20, 1, drafted=False)  # three steps were missed before
    span.step(21, 1, drafted=False)
    span.step(22, 2, drafted=True)
    assert (span.first, span.end) == (20, 22)
    span.step(30, 1, drafted=True)  # not one step was shown
    assert (span.first, span.end) == (30, 30)
    span.step(31, 1, drafted=True)
    assert (span.first, span.end) == (30, 31)
    assert not span.holds(24, 32)
    for known in range(32, 36):
        span.step(known, 1, drafted=False)
    span.step(40, 1, drafted=True)
    assert span.first == 40


def test_features_that_were_shown_longer_ago_than_a_window_reaches_are_gone() -> None:
    span = FeatureSpan(4)
    span.chunk(0, 10)
    for known in range(11, 20):
        span.step(known, 1, drafted=False)
    span.step(20, 1, drafted=True)
    assert (span.first, span.end) == (16, 20)
    assert not span.holds(12, 16) and not span.holds(16, 21)


def test_a_small_lms_span() -> None:
    span = CausalSpan.after_hit([True, False, True], 8)
    assert (span.first, span.end) == (0, 8)
    span.chunk(24, 30)
    assert span.end == 8, "it has read nothing of what is in between"
    span.step(31, 2, drafted=False)
    assert not span.holds(8, 16)
    span.step(33, 1, drafted=True)
    assert span.holds(24, 32) and not span.holds(32, 40)
    assert CausalSpan.after_hit([True, True], 8).end == 16


def test_who_keeps_what(model: Any) -> None:
    shape = RunnerShape(2, 64, 3, 4, 30)
    assert span_maker(None, 3) is None
    assert span_maker(make_drafter("suffix", 3, None, shape), 3) is None
    maker = span_maker(make_drafter("small-lm", 3, model, shape), 3)
    assert maker is not None and isinstance(maker([], 4), CausalSpan)
