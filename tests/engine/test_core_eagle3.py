"""Engines with an EAGLE-3 head on the CPU say what they say without, whatever is drafted, however scheduled."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from draft_models.eagle3_config import config_for
from draft_models.eagle3_cpu import Eagle3CpuDrafter
from draft_models.eagle3_cpu_network import Eagle3CpuNetwork
from draft_models.eagle3_weights import random_weights
from server.core import Phase, Request, SamplingParams
from server.engine.core import EngineCore
from server.engine.costs import warm_up
from server.engine.limits import Limits
from server.engine.runner import Runner
from server.engine.speculation import Speculation
from server.engine.step_runner import RunnerShape
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, Drafts
from tests.engine.eagle3_head import MAX_POSITIONS, deep_target, learned_head
from tests.engine.test_core_sampling import crowd as sampled_crowd
from tests.engine.test_overlapped_stress import crowd
from tests.engine.tiny import (
    EOS_ID,
    VOCAB_SIZE,
    Answers,
    engine,
    live,
    make_drafter,
    prompts,
    request,
    run,
    runner_of,
)  # fmt: skip

LENGTH = 24


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return deep_target(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def heads(target: Any) -> dict[str, Eagle3CpuNetwork]:
    """One that has learned, one that has not and cannot name every token."""
    narrow = config_for(target.config, 40)
    whole = config_for(target.config, VOCAB_SIZE)
    return {
        "learned": Eagle3CpuNetwork(whole, learned_head(target), target.embedding, MAX_POSITIONS),
        "random": Eagle3CpuNetwork(narrow, random_weights(narrow, 0), target.embedding, MAX_POSITIONS),
    }


@pytest.fixture(scope="module")
def expected(target: Any) -> dict[str, list[int]]:
    """Each request by itself, without drafts."""
    answers: dict[str, list[int]] = {}
    with torch.inference_mode():
        for req in batch(16):
            answers |= run(engine(target, max_num_seqs=1), [req])
    return answers


def batch(count: int) -> list[Request]:
    return [request(f"r{i}", prompt, LENGTH) for i, prompt in enumerate(prompts(16)[:count])]


def check(core: EngineCore, expected: dict[str, list[int]], count: int = 16) -> Answers:
    answers = run(core, batch(count))
    assert dict(answers) == {name: expected[name] for name in answers}
    assert len(answers) == count and answers.num_drafted > 0
    return answers


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("head", ["learned", "random"])
def test_a_batch_of_16(target: Any, heads: Any, expected: Any, head: str, k: int, ragged: bool, rule: str) -> None:
    answers = check(engine(target, "eagle3", k, draft_model=heads[head], ragged=ragged, rule=rule), expected)
    if head == "learned":
        assert answers.num_accepted > (0.3 if k < 5 else 0.2) * answers.num_drafted
        assert answers.num_accepted < answers.num_drafted


@pytest.mark.parametrize("head", ["learned", "random"])
def test_alone(target: Any, heads: Any, expected: Any, head: str) -> None:
    check(engine(target, "eagle3", 5, draft_model=heads[head], max_num_seqs=1), expected, 3)


def watch(core: EngineCore) -> dict[tuple[int, ...], list[int]]:
    """What is drafted behind which tokens, as it goes on."""
    drafter = runner_of(core).drafter
    seen: dict[tuple[int, ...], list[int]] = {}
    assert isinstance(drafter, Eagle3CpuDrafter)
    original = drafter.propose

    def propose(carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        drafts = original(carry, k, sampling)
        assert drafts.num_valid_host is not None
        for slot, row, count in zip(carry.slots, drafts.tokens.tolist(), drafts.num_valid_host, strict=True):
            seen[tuple(drafter.backlog.tails[slot].tokens)] = row[:count]
        return drafts

    drafter.propose = propose  # type: ignore[method-assign]
    return seen


def check_drafts(found: dict[tuple[int, ...], list[int]], truth: dict[tuple[int, ...], list[int]]) -> None:
    """The same behind the same tokens."""
    both = found.keys() & truth.keys()
    assert len(both) > 5
    for tokens in both:
        count = min(len(found[tokens]), len(truth[tokens]))
        assert found[tokens][:count] == truth[tokens][:count]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 8, 13])
def test_chunked_prefill(target: Any, heads: Any, expected: Any, budget: int) -> None:
    """Drafts do not depend on how the prompt came."""
    seen = []
    for size in (64, budget):
        core = engine(target, "eagle3", 3, draft_model=heads["learned"], budget=size, max_num_seqs=4)
        seen.append(watch(core))
        check(core, expected, 6)
    check_drafts(seen[1], seen[0])


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_forced_preemption(target: Any, heads: Any, expected: Any, ragged: bool, prefix_cache: bool) -> None:
    core = engine(
        target, "eagle3", 3, draft_model=heads["learned"], num_blocks=23, max_num_seqs=8, ragged=ragged,
        prefix_cache=prefix_cache,
    )  # fmt: skip
    free = engine(target, "eagle3", 3, draft_model=heads["learned"], max_num_seqs=8)
    seen = [watch(core), watch(free)]
    check(core, expected, 10)
    check(free, expected, 10)
    assert core.stats().num_preemptions > 0
    check_drafts(*seen)


@pytest.mark.parametrize("length", [8, 9, 11, 12])
def test_prefix_hits(target: Any, heads: Any, length: int) -> None:
    """The same prompt again, and one that goes another way: same hits, text and drafts as if nothing were cached."""
    first = prompts(1, low=20, high=21)[0][:length]
    forked = [*first[:6], *prompts(1, seed=5)[0]]
    rounds = [[request("r0", first, LENGTH)], [request("r0", first, LENGTH), request("r1", forked, LENGTH)]]
    found = {}
    for name, cache in (("none", True), ("eagle3", True), ("eagle3", False)):
        core = engine(target, name, 3, draft_model=heads["learned"], prefix_cache=cache)
        answers = [run(core, requests) for requests in rounds]
        found[name, cache] = [dict(a) for a in answers], core.stats().num_cached_tokens, answers[1].num_accepted
    plain, cached, anew = found.values()
    assert plain[:2] == cached[:2] and cached[0] == anew[0]
    assert cached[1] == (length - 1) // 4 * 4 + 4 and anew[1] == 0
    assert cached[2] == anew[2] > 0


def test_an_answer_is_a_prefix_of_the_next_turn(target: Any, heads: Any, expected: Any) -> None:
    """What an answer leaves in its blocks is as good as what a prompt does."""
    prompt = batch(1)[0].prompt_ids
    follow_up = [*prompt, *expected["r0"], 7, 9, 11]
    found = []
    for cache in (True, False):
        core = engine(target, "eagle3", 5, draft_model=heads["learned"], prefix_cache=cache)
        run(core, batch(1))
        found.append(run(core, [request("next", follow_up, LENGTH)]))
        if cache:
            assert core.stats().num_cached_tokens >= len(prompt) + 20
    assert dict(found[0]) == dict(found[1]) and found[0].num_accepted == found[1].num_accepted


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("head", ["learned", "random"])
def test_seeded_output_of_a_crowd(target: Any, heads: Any, head: str, ragged: bool) -> None:
    alone: dict[str, list[int]] = {}
    for req in sampled_crowd():
        alone |= run(engine(target, max_num_seqs=1), [req])
    for k in (1, 4):
        answers = run(engine(target, "eagle3", k, draft_model=heads[head], ragged=ragged), sampled_crowd())
        assert dict(answers) == alone
        assert answers.num_accepted > 0


@pytest.mark.parametrize("ragged", [True, False])
def test_the_rule_ratio_repeats(target: Any, heads: Any, expected: Any, ragged: bool) -> None:
    found = []
    for _ in range(2):
        core = engine(target, "eagle3", 3, draft_model=heads["learned"], rule="ratio", ragged=ragged)
        found.append(run(core, sampled_crowd()))
    assert dict(found[0]) == dict(found[1]) and found[0].num_accepted > 0
    assert found[0]["g"] == run(engine(target), sampled_crowd()[-1:])["g"]


# -- pauses ------------------------------------------------------------------------------------------------


class Changing(Speculation):
    """k changes from step to step; nothing is drafted in the first `pause` verify steps, nor, now and then, later."""

    def __init__(self, tiers: tuple[int, ...], pause: int = 0, seed: int | None = None) -> None:
        super().__init__(None, max(tiers), False)
        self.choices, self.left = tiers, pause
        self.random = None if seed is None else random.Random(seed)

    def num_draft_tokens(self, num_rows: int, num_eligible: int) -> int:
        if self.random is not None and not self.left and self.random.random() < 0.2:
            self.left = self.random.choice([1, 2, 9])
        self.left = max(0, self.left - 1)
        if self.left or not num_eligible:
            return 0
        return self.choices[-1] if self.random is None else self.random.choice(self.choices)

    def follows(self, phase: Phase, num_rows: int) -> bool:
        """Whether the drafter sees a step without drafts."""
        return not self.left


def engine_of(target: Any, head: Eagle3CpuNetwork, speculation: Speculation, budget: int = 64) -> EngineCore:
    core = engine(target, "eagle3", 3, draft_model=head, budget=budget)
    core.speculation = speculation
    runner_of(core).trim = speculation.trim
    return core


@pytest.mark.parametrize("budget", [5, 64])
@pytest.mark.parametrize("seed", range(3))
def test_pauses_and_changes_of_k(target: Any, heads: Any, expected: Any, seed: int, budget: int) -> None:
    check(engine_of(target, heads["learned"], Changing((1, 3), seed, seed), budget), expected)


def test_after_a_pause_drafts_are_as_good_as_before(target: Any, heads: Any) -> None:
    """One is paused in the first steps, the other drafts from the start: from there on they draft the same."""
    seen = []
    for pause in (0, 9):
        core = engine_of(target, heads["learned"], Changing((3,), pause), budget=6)
        seen.append(watch(core))
        run(core, [request("r", batch(16)[3].prompt_ids, 40)])
    check_drafts(seen[1], seen[0])


def test_it_does_not_run_in_a_pause(target: Any, heads: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = engine_of(target, heads["learned"], Changing((3,), 10**6))
    run(core, [request("first", prompts(1)[0], 4)])
    monkeypatch.setattr(Eagle3CpuNetwork, "project", None)
    monkeypatch.setattr(Eagle3CpuNetwork, "fuse", None)
    answers = run(core, batch(4))
    assert dict(answers) == {name: expected[name] for name in answers} and answers.num_drafted == 0


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize(("seed", "behind"), [*((seed, 0.0) for seed in range(8)), *((seed, 0.5) for seed in range(4))])
def test_random_engines(target: Any, heads: Any, seed: int, behind: float, rule: str) -> None:
    """Any block size, pools as small as one sequence, k that changes, requests that are held and aborted, some of them
    in the background."""
    draw = random.Random(f"{rule}{seed}")
    k, size = draw.choice([1, 2, 3, 5, 7, 15]), draw.choice([1, 3, 4, 5, 16])
    num_seqs, length = draw.choice([1, 2, 3, 5, 8]), draw.choice([40, 61, 64])
    need = -(-length // size)
    num_blocks = 1 + need + draw.choice([0, 0, 1, 2, need, 3 * need])
    shape = RunnerShape(num_seqs, length, k, size, num_blocks, rule, draw.choice([True, False]))
    drafter = make_drafter("eagle3", k, heads[draw.choice(["learned", "random"])], shape)
    assert isinstance(drafter, Eagle3CpuDrafter)
    runner = Runner(target, drafter, shape)
    for pool in [*runner.pools, *drafter.pools]:
        pool[size:].normal_()
    speculation = draw.choice([Changing((1, k), seed=seed), Changing((k,), 5), Speculation(None, k, False)])
    limits = Limits(num_seqs, draw.choice([1, 3, 7, 16, 64]), length, size, num_blocks, draw.random() < 0.7)
    core = EngineCore(runner, limits, speculation, (EOS_ID,))
    requests = crowd(draw, length)
    if behind:
        requests = [replace(r, background=draw.random() < behind) for r in requests]
    if rule == "ratio":  # sampled text depends on the drafts
        requests = [replace(r, sampling=SamplingParams(temperature=0.0)) for r in requests]
    truth = run(engine(target, max_num_seqs=8, num_blocks=2000, prefix_cache=False), requests)
    found, gone = live(core, list(requests), draw)
    for name in truth.keys() - gone:
        assert found[name] == truth[name], name
        assert found.reasons[name] == truth.reasons[name]


def test_warming_up_leaves_nothing_behind(target: Any, heads: Any, expected: Any) -> None:
    """The network and the drafter have run, and requests get what they would have got."""
    core = engine(target, "eagle3", 3, draft_model=heads["learned"])
    runner = runner_of(core)
    calls: list[int] = []
    forward = target.forward

    def noted(token_ids: torch.Tensor, *rest: Any) -> Any:
        calls.append(token_ids.shape[0])
        return forward(token_ids, *rest)

    target.forward = noted
    try:
        with torch.inference_mode():
            warm_up(runner)
    finally:
        del target.forward
    assert len(calls) == 3 and max(calls) >= 32, "a plain step, one with drafts, a prompt"
    assert all(not pool[: runner.shape.block_size].any() for pool in runner.pools), "the null block is as it was"
    check(core, expected)
