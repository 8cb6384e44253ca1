"""Engines whose drafter copies or predicts: what rows get, what is learned of it, what goes on without a chain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from draft_models.eagle3_chain import ChainShape, TorchSampler
from draft_models.hybrid import LEARNED, HybridDrafter
from draft_models.hybrid_device import HybridDeviceDrafter
from draft_models.small_lm import SmallLMDrafter
from draft_models.small_lm_device import SmallLMDeviceDrafter
from draft_models.suffix import CLASS_NAMES, Match, SuffixDrafter
from server.core import SamplingParams
from server.engine import costs as costs_module
from server.engine.core import EngineCore
from server.engine.gpu.runner import GpuRunner
from server.engine.mixed_speculation import MixedSpeculation
from server.engine.result import StepResult
from server.models.paged_forward import TorchForward
from server.spec.cost_table import CostGrid, CostTable
from tests.engine.tiny import BLOCK_SIZE, Answers, engine, prompts, request, run

K = 5
LOOP = [5, 9, 17, 30, 41, 8, 22, 60, 33] * 4


class Fixed(CostTable):
    """Costs that no step changes: the tests' own take what they take."""

    def observe(self, num_rows: int, num_tokens: int, context: float, ms: float) -> None:
        pass


def costs(draft: float = 0.01, table: type[CostTable] = Fixed) -> CostTable:
    """A draft token costs a twentieth of a step to verify and `draft` to draft."""
    drafts = np.array([0, 1, K])
    verify = np.tile((1.0 + 0.05 * drafts)[None, :, None], (2, 1, 1))
    return table(CostGrid((1, 16), (0, 1, K), (64,)), verify, np.tile((draft * drafts)[None], (2, 1)))


def hybrid(model: Any, draft_model: Any, device: bool, table: CostTable | None = None, **options: Any) -> EngineCore:
    drafter: HybridDrafter | HybridDeviceDrafter
    if device:
        chain = SmallLMDeviceDrafter(
            TorchForward(draft_model),
            draft_model.kv_layers,
            torch.float32,
            draft_model.device,
            ChainShape(17, 400, BLOCK_SIZE, K),
            TorchSampler(model.vocab_size, options.get("rule", "coupled")),
        )
        drafter = HybridDeviceDrafter(SuffixDrafter(), chain, K)
    else:
        drafter = HybridDrafter(SuffixDrafter(), SmallLMDrafter(draft_model, 16, 400, BLOCK_SIZE, "coupled"), K)
    core = engine(model, drafter, K, costs=table, overlapped=device, **options)
    assert isinstance(core.speculation, MixedSpeculation) and drafter.arbiter is core.speculation
    return core


def learned_of(core: EngineCore) -> dict[str, float]:
    """Acceptance of the first draft by class, of the classes that were tried."""
    tracker = core.speculation.acceptance
    return {name: tracker.conditional(name, 0) for name in tracker.classes() if tracker._classes[name].trials}


def steps(answers: Answers, name: str) -> list[int]:
    return [len(output.token_ids) for output in answers.outputs if output.request_id == name]


@pytest.mark.parametrize("table", [None, "costs"])
@pytest.mark.parametrize("device", [False, True])
def test_text_is_what_it_is_without_drafts(
    model: Any, other_model: Any, greedy: Any, device: bool, table: str | None
) -> None:
    core = hybrid(model, other_model, device, costs() if table else None)
    batch = prompts(12)
    answers = run(core, [request(f"r{i}", p) for i, p in enumerate(batch)])
    assert [answers[f"r{i}"] for i in range(12)] == [greedy(p, 24) for p in batch]
    assert answers.num_accepted > 0


@pytest.mark.parametrize("device", [False, True])
def test_text_that_repeats_itself_is_copied_many_tokens_a_step(
    model: Any, other_model: Any, greedy: Any, device: bool
) -> None:
    """Twice the same: what follows is foretold by a prediction, which the poor draft model knows nothing of."""
    prompt = prompts(1)[0]
    answer = greedy(prompt, 60)
    core = hybrid(model, other_model, device, costs())
    answers = run(core, [request("r", prompt, 60, prediction_ids=answer)])
    assert answers["r"] == answer
    assert sum(steps(answers, "r")) / len(steps(answers, "r")) > 3.5  # probes of other lengths included
    assert any(name.startswith("predicted") for name in learned_of(core))


@pytest.mark.parametrize("device", [False, True])
def test_new_text_is_left_to_the_chain(model: Any, greedy: Any, device: bool) -> None:
    """The draft model is the target: its drafts are all accepted, so no short match is preferred for long."""
    core = hybrid(model, model, device, costs(0.0))
    batch = prompts(8)
    for _ in range(2):
        run(core, [request(f"r{i}", p, 40) for i, p in enumerate(batch)])
    answers = run(core, [request(f"r{i}", p, 40) for i, p in enumerate(batch)])
    found = learned_of(core)
    assert found[LEARNED] > 0.9
    assert answers.num_accepted > 0.75 * answers.num_drafted


@pytest.mark.parametrize("device", [False, True])
def test_copying_goes_on_where_the_chain_does_not_pay(model: Any, greedy: Any, device: bool) -> None:
    """The best of draft models, but each of its drafts costs ten steps."""
    prompt = prompts(1)[0]
    answer = greedy(prompt, 60)
    core = hybrid(model, model, device, costs(10.0))
    chain: Any = core.runner.drafter.learned  # type: ignore[union-attr]
    calls = []
    name = "draft" if device else "propose"
    setattr(chain, name, lambda *args: calls.append(name))
    for i in range(3):
        run(core, [request(f"r{i}", prompt, 60, prediction_ids=answer)])
    answers = run(core, [request("r3", prompt, 60, prediction_ids=answer)])
    assert answers["r3"] == answer
    assert sum(steps(answers, "r3")) / len(steps(answers, "r3")) > 4.0
    assert not calls and not core.stats().speculation_paused


@pytest.mark.parametrize("device", [False, True])
def test_a_chain_that_is_left_out_comes_back_and_knows_everything(model: Any, greedy: Any, device: bool) -> None:
    core = hybrid(model, model, device, costs(10.0))
    batch = prompts(4)
    run(core, [request(f"a{i}", p, 30) for i, p in enumerate(batch)])
    assert isinstance(core.speculation, MixedSpeculation)
    for i, p in enumerate(batch):
        core.submit(request(f"b{i}", p, 60))
    for _ in range(12):
        core.step()
    core.speculation.costs = costs(0.0)
    answers = run(core, [])
    for i, p in enumerate(batch):
        assert greedy(p, 60)[-len(answers[f"b{i}"]) :] == answers[f"b{i}"]
    assert learned_of(core)[LEARNED] > 0.9


@pytest.mark.parametrize("device", [False, True])
def test_sampled_text_is_the_same_too(model: Any, other_model: Any, device: bool) -> None:
    batch = prompts(6)
    warm = [SamplingParams(temperature=0.9, seed=i, top_p=0.9) for i in range(6)]
    requests = [request(f"r{i}", p, 40, sampling=warm[i]) for i, p in enumerate(batch)]
    assert dict(run(hybrid(model, other_model, device, costs()), requests)) == dict(run(engine(model), requests))


def speculation(model: Any, device: bool = True) -> MixedSpeculation:
    made = hybrid(model, model, device, costs()).speculation
    assert isinstance(made, MixedSpeculation)
    return made


def result(classes: list[str], copied: list[int], drafted: list[int], accepted: list[int]) -> StepResult:
    n = len(classes)
    return StepResult(
        [[1]] * n, drafted, accepted, classes, [None] * n, [False] * n, n, verify_ms=1.0, num_copied=copied
    )


def test_a_row_that_copied_tells_of_what_it_copied_only(model: Any) -> None:
    made = speculation(model)
    made.record(result(["prompt:2", LEARNED], [2, 0], [5, 5], [4, 1]), 64.0, [True, True])
    trials = {name: found.trials for name, found in made.acceptance._classes.items() if found.trials}
    assert trials == {"prompt:2": [1.0, 1.0], LEARNED: [1.0, 1.0, 0.0, 0.0, 0.0]}
    assert made.accepted_per_position == [2, 1, 1, 1, 0] and made.drafted_per_position == [2] * 5
    before = made.acceptance.survival(LEARNED, 5)
    for _ in range(50):
        made.record(result(["prompt:9+"], [5], [5], [0]), 64.0, [True])
    assert made.acceptance.survival(LEARNED, 5) == before
    assert made.acceptance.conditional("prompt:9+", 0) < 0.1 < made.acceptance.conditional("output:9+", 0)


def test_lengths_that_are_copied_follow_what_was_accepted(model: Any) -> None:
    made = speculation(model)
    match = Match([1] * 6, 6, 1, False)
    for _ in range(200):
        made.record(result([LEARNED, "prompt:5-8", "prompt:9+"], [0, 5, 5], [5] * 3, [2, 1, 5]), 64.0, [True] * 3)
    made._state = made._state.__class__(credit=0.0)  # no probes
    made._lengths.clear()
    assert made.lengths(match, 5) >> 5 & 0b11111 == 0b10000
    made._state = made._state.__class__(credit=4.0)
    assert -1 in {made.lengths(match, 5) for _ in range(4)}, "now and then it is tried"


def test_without_costs_too_each_step_copies_by_what_was_learned_until_then(model: Any) -> None:
    made = hybrid(model, model, True).speculation
    assert isinstance(made, MixedSpeculation)
    match = Match([1] * 6, 9, 1, False)
    assert made.num_draft_tokens(1, 1) == K and made.lengths(match, K) >> 9 & 1
    for _ in range(100):
        made.record(result([LEARNED, "prompt:9+"], [0, 5], [5, 5], [5, 0]), 64.0, [True, True])
    made._state = made._state.__class__(credit=-9.0)
    assert made.num_draft_tokens(1, 1) == K and not made.lengths(match, K) >> 9 & 1


def test_cost_is_corrected_without_the_chain_s_part(model: Any) -> None:
    made = speculation(model)
    assert made.costs is not None
    made.costs = costs(0.5, CostTable)
    for _ in range(50):
        step = result([LEARNED], [0], [5], [0])
        step.num_tokens_run, step.chain_tokens, step.verify_ms = 6, 5, 1.25 + 2.5
        made.record(step, 64.0, [True])
    assert made.costs.verify_ms(1, 6, 64.0) == pytest.approx(1.25, rel=0.01)
    assert made.costs.draft_ms(1, 5) == pytest.approx(2.5, rel=0.01)


def test_k_is_chosen_for_what_can_be_copied_now(model: Any) -> None:
    """One k for the rows as they are: long where the host sees a repeat, none where chain and costs promise nothing."""
    made = speculation(model)
    drafter = made.drafter
    assert isinstance(drafter, HybridDeviceDrafter)
    made.costs = costs(1.0)
    for _ in range(100):
        made.record(result([LEARNED, "output:9+"], [0, 5], [5, 5], [0, 5]), 64.0, [True, True])
    made._state = made._state.__class__(credit=-9.0)
    assert made.num_draft_tokens(1, 1) == 0 and made.paused
    drafter.admit(0, LOOP, 1)
    drafter.observe(0, [LOOP[0]])
    assert made.num_draft_tokens(1, 1) == K and not drafter.chain and not made.paused
    assert made.num_draft_tokens(1, 0) == 0


def test_first_estimates_try_long_matches_and_leave_short_ones(model: Any) -> None:
    made = speculation(model)
    first = {name: made.acceptance.conditional(name, 0) for name in CLASS_NAMES}
    assert first["prompt:1"] < first["prompt:2"] < first["prompt:3-4"] < first["prompt:5-8"] < first["prompt:9+"]
    assert first["output:2?"] < first["output:2"] and first["predicted:start"] == 0.5


def test_half_a_without_a_chain_leaves_its_values_where_half_b_reads_them(model: Any) -> None:
    """Half B is captured on the tensors of a step with a chain, q among them."""
    core = hybrid(model, model, True, rule="ratio")
    assert isinstance(core.runner, GpuRunner)
    executor, state = core.runner.executor, core.runner.state
    state.slots.history[0, :3] = torch.tensor([5, 6, 7])
    state.slots.num_tokens[0] = 3
    state.block_tables[0, :4] = torch.arange(1, 5)
    executor.program.drafter.admit(0, [5, 6, 7], 3, [40, 41, 42, 43, 44, 45, 46])  # type: ignore[union-attr]
    state.sampling.set(0, SamplingParams(temperature=1.0, seed=3), 0)
    executor.send(1, K, [0], [K], [])
    executor.forward(1, K)
    kept = executor._staged[1, K]
    tokens, probs = kept.drafts.tokens, kept.drafts.probs
    assert probs is not None
    tokens.zero_(), probs.fill_(-1.0)
    executor.forward(1, K, chain=False)
    assert executor._staged[1, K] is kept and kept.drafts.tokens is tokens and kept.drafts.probs is probs
    assert tokens.tolist() == [[40, 41, 42, 43, 44]] and kept.drafts.num_valid.tolist() == [K]
    assert torch.equal(probs.argmax(-1), tokens) and torch.equal(probs.sum(-1), torch.ones(1, K))


def test_what_the_chain_costs_is_a_step_with_it_less_one_without(model: Any) -> None:
    core = hybrid(model, model, True)
    assert isinstance(core.runner, GpuRunner)
    calls: list[tuple[int, int, int, bool]] = []

    def time_step(rows: int, k: int, context: int, repeats: int = 3, chain: bool = True) -> float:
        calls.append((rows, k, context, chain))
        return 5.0 if chain else 3.5

    core.runner.executor.time_step = time_step  # type: ignore[assignment, method-assign]
    timer = costs_module._gpu_draft_timer(core.runner, 32)
    assert timer is not None and timer(4, 3) == 1.5
    assert calls == [(4, 3, 32, True), (4, 3, 32, False)]
    plain = engine(model, "suffix", K, overlapped=True)
    assert isinstance(plain.runner, GpuRunner) and costs_module._gpu_draft_timer(plain.runner, 32) is None


def test_a_step_can_be_timed_without_the_chain(model: Any) -> None:
    core = hybrid(model, model, True)
    assert isinstance(core.runner, GpuRunner)
    for chain in (True, False):
        assert core.runner.executor.time_step(2, K, 8, 1, chain=chain) > 0.0
    assert run(core, [request("r", [5, 6, 7])])["r"] == run(engine(model), [request("r", [5, 6, 7])])["r"]
