"""Steps whose chain was left out are seen and write nothing: blocks, prompts and pauses of engines that copy."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draft_models.eagle3 import Eagle3Drafter
from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.eagle3_config import config_for
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from draft_models.eagle3_network import Eagle3Network
from draft_models.eagle3_weights import random_weights
from draft_models.hybrid import HybridDrafter
from draft_models.hybrid_device import HybridDeviceDrafter
from draft_models.small_lm_device import SmallLMDeviceDrafter
from draft_models.suffix import Match, SuffixDrafter
from server.core import Phase, SpeculationParams
from server.engine.core import EngineCore
from server.engine.draft_kv import CausalSpan
from server.engine.mixed_speculation import MixedSpeculation
from server.models.paged_forward import TorchForward
from server.models.paging import Span, make_pools, ragged_batch
from server.spec.cost_table import CostGrid, CostTable
from tests.engine.eagle3_head import deep_target
from tests.engine.test_draft_kv import dense
from tests.engine.tiny import BLOCK_SIZE, Wavering, engine, prompts, request, run

K, NUM_BLOCKS, NUM_SEQS = 3, 400, 4
KINDS = ("eagle3", "small-lm", "small-lm on a cpu")


class Fickle:
    """Copies what it likes, and runs the chain when it likes."""

    def __init__(self, draw: random.Random) -> None:
        self.random = draw

    def divide(self, matches: Any, limits: Any, context: float) -> tuple[int, list[bool]]:
        return self.random.choice([0, 1, K, K]), [m is not None and self.random.random() < 0.5 for m in matches]

    def lengths(self, match: Match, k: int) -> int:
        return self.lengths_of(match.family, k)

    def lengths_of(self, family: int, k: int) -> int:
        return self.random.choice([0, -1])


class ComesAndGoes(Wavering):
    """The chain does, by itself."""

    drafter: Any

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        if isinstance(self.drafter, HybridDeviceDrafter):
            self.drafter.chain = self.random.random() < 0.6
        return super().num_draft_tokens(num_rows, num_eligible)


class FixedCosts(CostTable):
    """Nothing is learned of steps, which take no time here."""

    def observe(self, num_rows: int, num_tokens: int, context: float, ms: float) -> None:
        pass


def costs(verify: float, chain: float) -> FixedCosts:
    """A step without drafts costs 1, with K of them `verify` and `chain` for drafting them."""
    grid = CostGrid((1, NUM_SEQS), (0, 1, K), (16,))
    steps = np.tile(np.array([1.0, 1.0 + (verify - 1.0) / K, verify])[None, :, None], (2, 1, 1))
    return FixedCosts(grid, steps, np.tile(np.array([0.0, chain / K, chain])[None], (2, 1)))


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("deep")
    return deep_target(path)


def hybrid(model: Any, kind: str, table: CostTable | None = None) -> EngineCore:
    """`eagle3` is a random head, `small-lm` the target itself."""
    chain, sampler = ChainShape(NUM_SEQS + 1, NUM_BLOCKS, BLOCK_SIZE, K), TorchSampler(model.vocab_size, "coupled")
    device = not kind.endswith("cpu")
    learned: Any
    drafter: Any = "hybrid"
    if kind == "eagle3":
        head = config_for(model.config, 32)
        network = Eagle3Network(head, random_weights(head, 0), model.embedding, 160)
        learned = Eagle3Drafter(network, chain, sampler)
        drafter = HybridDeviceDrafter(SuffixDrafter(), learned, K)
    elif device:
        learned = SmallLMDeviceDrafter(
            TorchForward(model), model.kv_layers, torch.float32, model.device, chain, sampler
        )
        drafter = HybridDeviceDrafter(SuffixDrafter(), learned, K)
    core = engine(
        model, drafter, K, draft_model=model, max_num_seqs=NUM_SEQS, num_blocks=NUM_BLOCKS, costs=table,
        overlapped=device,
    )  # fmt: skip
    found: Any = core.runner.drafter
    for pool in found.pools:
        pool[BLOCK_SIZE:].normal_()
    core.speculation.tiers = (1, K)
    return core


def right(model: Any, drafter: Any, tokens: list[int]) -> list[torch.Tensor]:
    """Keys and values, layer by layer, that all `tokens` have of the learned drafter."""
    if drafter.feature_layers:
        return [dense(model, drafter, tokens)[0]]
    count = len(tokens)
    blocks = list(range(1, count // BLOCK_SIZE + 2))
    pools = make_pools(model.kv_layers, (blocks[-1] + 1) * BLOCK_SIZE, torch.float32, model.device)
    with torch.inference_mode():
        batch = ragged_batch([Span(0, count, blocks, True)], BLOCK_SIZE)
        model.forward(torch.tensor(tokens), pools, batch, torch.arange(1))
    return [pool[BLOCK_SIZE:] for pool in pools]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_marked_blocks_hold_the_chains_keys_and_values(deep_model: Any, kind: str, seed: int) -> None:
    """Whatever was copied and whoever did not draft; the text is the same."""
    core = hybrid(deep_model, kind)
    drafter: Any = core.runner.drafter
    speculation = ComesAndGoes(K, seed, (1, K), 0.1)
    speculation.drafter, drafter.arbiter = drafter, Fickle(speculation.random)
    core.speculation = speculation
    said = prompts(NUM_SEQS, seed, 9, 20)
    plain = engine(deep_model)
    for turn in range(3):
        modest = [SpeculationParams(turn != 1 or i > 0) for i in range(NUM_SEQS)]
        batch = [request(f"{i}.{turn}", list(t), 20, speculation=modest[i]) for i, t in enumerate(said)]
        found = run(core, batch)
        assert found == run(plain, batch)
        for i, tokens in enumerate(said):
            tokens += found[f"{i}.{turn}"]
    marked = full = 0
    for tokens in said:
        blocks, _ = core.scheduler.cache.match(tokens, len(tokens))
        expected = right(deep_model, drafter.learned, tokens)
        for i, block in enumerate(blocks):
            full += 1
            if core.scheduler.pool.is_drafted(block):
                marked += 1
                part, places = (slice(n * BLOCK_SIZE, (n + 1) * BLOCK_SIZE) for n in (i, block))
                for pool, values in zip(drafter.pools, expected, strict=True):
                    torch.testing.assert_close(pool[places], values[part], rtol=1e-3, atol=1e-3)
    assert 0 < marked < full or (kind != "eagle3" and marked == full)


def test_a_pause_costs_nothing(deep_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither copies nor chain pay, ever: no features, nothing of the drafter, and prompts are not its either."""
    core = hybrid(deep_model, "eagle3", costs(100.0, 100.0))
    runner: Any = core.runner
    calls: Counter[str] = Counter()
    for name in ("draft", "draft_copies", "after_verify", "prefill_chunk"):
        monkeypatch.setattr(runner.drafter, name, lambda *args, name=name: calls.update([name]))
    forward = runner.program.forward

    def noted(*args: Any) -> Any:
        calls["features"] += bool(args[6])
        return forward(*args)

    monkeypatch.setattr(runner.program, "forward", noted)
    batch = [request(f"r{i}", prompt, 30) for i, prompt in enumerate(prompts(6))]
    assert run(core, batch) == run(engine(deep_model), batch)
    assert not +calls
    stats = core.stats()
    assert stats.speculation_paused and stats.predicted_speedup == 1.0
    assert stats.speculation_pause_reason is not None and "at best k = 1" in stats.speculation_pause_reason


def test_prompts_are_the_chains_if_it_would_draft(deep_model: Any) -> None:
    """Whatever the last step was; also where copies alone were drafted until then."""
    for chain, expected in ((0.01, True), (50.0, False)):
        core = hybrid(deep_model, "eagle3", costs(1.02, chain))
        speculation, drafter = core.speculation, core.runner.drafter
        assert isinstance(speculation, MixedSpeculation) and isinstance(drafter, HybridDeviceDrafter)
        drafter.chain = not expected
        assert speculation.follows(Phase.PREFILL, 2) is expected
        assert drafter.chain is expected
    cpu = hybrid(deep_model, "small-lm on a cpu", costs(1.02, 0.01))
    drafts = cpu.runner.drafter
    assert isinstance(drafts, HybridDrafter)
    assert cpu.speculation.follows(Phase.PREFILL, 2)
    drafts.chain = False
    assert not cpu.speculation.follows(Phase.PREFILL, 2) and cpu.speculation.follows(Phase.VERIFY, 2)


def test_before_the_chain_is_tried_again_steps_are_shown(deep_model: Any) -> None:
    core = hybrid(deep_model, "eagle3", costs(1.2, 0.3))
    speculation = core.speculation
    for _ in range(300):
        speculation.acceptance.update("learned", K, 0)
    shown = chained = since = 0
    for _ in range(600):
        k = speculation.num_draft_tokens(4, 4)
        if k:
            assert since >= K + 1 or shown + chained < 20, "as many as a chain is long"
            chained, since = chained + 1, 0
        elif speculation.follows(Phase.VERIFY, 4):
            shown, since = shown + 1, since + 1
        else:
            assert since == 0, "once begun it goes on to the probe"
    assert speculation.paused
    assert 5 < chained < 40 and chained < shown <= (K + 1) * (chained + 1)


class Switched(Wavering):
    """Drafts or is paused, as the test says."""

    off = False

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        return 0 if self.off or not num_eligible else K

    def follows(self, phase: Phase, num_rows: int) -> bool:
        return not self.off


@pytest.mark.parametrize("name", ["eagle3", "hybrid"])
def test_a_head_on_a_cpu_keeps_what_a_pause_hides(deep_model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not run, and afterwards it drafts for blocks of a prefix hit and for a row of before."""
    head = config_for(deep_model.config, 32)
    network = Eagle3CpuNetwork(head, random_weights(head, 0), deep_model.embedding, 160)
    core = engine(deep_model, name, K, draft_model=network, max_num_seqs=NUM_SEQS, num_blocks=NUM_BLOCKS)
    switch = Switched(K, 0, (K,))
    monkeypatch.setattr(core, "speculation", switch)
    drafter: Any = core.runner.drafter
    learned = getattr(drafter, "learned", drafter)
    calls: Counter[str] = Counter()
    for part in ("prefill", "propose", "commit", "keep"):
        call = getattr(learned, part)
        monkeypatch.setattr(learned, part, lambda *a, part=part, call=call: (calls.update([part]), call(*a))[1])
    monkeypatch.setattr(core.runner, "_keep", drafter.keep)
    monkeypatch.setattr(drafter, "_keep", learned.keep, raising=False)
    prompt = prompts(1, 3, 22, 24)[0]
    long = request("long", prompt, 60)
    expected = run(engine(deep_model), [long])
    assert core.submit(long) is None
    switch.off = True
    emitted: list[int] = []
    for _ in range(12):
        emitted += [token for output in core.step() for token in output.token_ids]
    assert calls["keep"] >= 12 and set(calls) == {"keep"}
    switch.off = False
    follower = request("again", [*prompt, *emitted[:4], 5], 20)
    found = run(core, [follower])
    assert emitted + found["long"] == expected["long"]
    assert found["again"] == run(engine(deep_model), [follower])["again"]
    assert calls["propose"] and calls["prefill"] and found.num_drafted
    assert any(output.num_cached for output in found.outputs)


def test_tokens_that_were_copied_come_late() -> None:
    """Read one step late: the chain behind a step that emitted many has not all of them, the next one has."""
    span = CausalSpan(end=16)
    span.step(17, 4, drafted=False)
    span.step(21, 1, drafted=True)
    assert span.end == 17
    span.step(22, 1, drafted=True)
    assert span.end == 22
