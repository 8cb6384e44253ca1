"""Deterministic mode in bfloat16: the same bits whatever is drafted, batched, chunked, cached or preempted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.core import SamplingParams
from server.engine.core import EngineCore
from tests.engine.tiny import Answers, request
from tests.gpu.small import Engines, finish, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_PROMPTS = 32
NUM_ALONE = 6
LENGTH = 64
WHOLE, CHUNKED = 4096, 40
KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "seeded": SamplingParams(temperature=0.9, seed=11, top_p=0.95),
    "logprobs": SamplingParams(temperature=0.0, logprobs=2),
}
Bits = list[Any]


def bits(answers: Answers, name: str) -> Bits:
    """Tokens, and their log-probabilities where they were asked for: floats that must be equal, not close."""
    logprobs = [
        (e.logprob, e.top_ids, e.top_logprobs)
        for o in answers.outputs
        if o.request_id == name
        for e in o.logprobs or []
    ]
    return [answers[name], logprobs]


def batch(kind: str) -> list[list[int]]:
    """Other prompts for every kind, so that none finds what another left in the prefix cache; two of them long."""
    seed = list(KINDS).index(kind)
    return [*prompts(NUM_PROMPTS - 2, seed, 17, 100), *prompts(2, seed + 100, 520, 720)]


def requests(kind: str, only: int | None = None) -> list[Any]:
    everything = enumerate(batch(kind))
    return [
        request(f"r{i}", prompt, LENGTH, sampling=KINDS[kind]) for i, prompt in everything if only is None or i == only
    ]


def together(core: EngineCore, kind: str) -> dict[int, Bits]:
    answers = finish(core, requests(kind), {})
    return {i: bits(answers, f"r{i}") for i in range(NUM_PROMPTS)}


def alone(core: EngineCore, kind: str, events: bool = False) -> dict[int, Bits]:
    """One after another, among them both long ones; with `events` each is set aside and computed anew on its way."""
    found = {}
    for i in range(NUM_PROMPTS - NUM_ALONE, NUM_PROMPTS):
        aside = {5: [("hold", f"r{i}")], 7: [("resume", f"r{i}")]} if events else {}
        found[i] = bits(finish(core, requests(kind, i), aside), f"r{i}")
    return found


def same(found: dict[int, Bits], expected: dict[int, Bits]) -> None:
    different = [i for i, value in found.items() if value != expected[i]]
    assert not different, f"{len(different)} of {len(found)} differ: {different}"


def deterministic(engines: Engines, drafter: str, budget: int, *, roomy: bool) -> EngineCore:
    """`roomy`: with a prefix cache; else without one, and with fewer blocks than 32 rows need."""
    return engines.get(
        drafter,
        5,
        deterministic=True,
        max_num_seqs=NUM_PROMPTS,
        max_num_batched_tokens=budget,
        prefix_cache=roomy,
        kv_cache_tokens=16384 if roomy else 1280,
    )


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def expected(engines: Engines, kind: str) -> dict[int, Bits]:
    """Plain, whole, without a prefix cache, each request alone."""
    core = deterministic(engines, "none", WHOLE, roomy=False)
    singly = (finish(core, requests(kind, i), {}) for i in range(NUM_PROMPTS))
    return {i: bits(answers, f"r{i}") for i, answers in enumerate(singly)}


@pytest.mark.parametrize("budget", [WHOLE, CHUNKED])
@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_bit_identical(engines: Engines, expected: dict[int, Bits], drafter: str, budget: int, kind: str) -> None:
    core = deterministic(engines, drafter, budget, roomy=True)
    before = core.stats()
    same(together(core, kind), expected)
    assert core.stats().num_cached_tokens == before.num_cached_tokens
    same(together(core, kind), expected)
    same(alone(core, kind), expected)
    same(alone(core, kind, events=True), expected)
    after = core.stats()
    assert after.num_cached_tokens > before.num_cached_tokens
    if drafter == "suffix":
        assert sum(after.accepted_per_position) > sum(before.accepted_per_position)


@pytest.mark.parametrize("budget", [WHOLE, CHUNKED])
@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_bit_identical_without_a_prefix_cache(
    engines: Engines, expected: dict[int, Bits], drafter: str, budget: int, kind: str
) -> None:
    core = deterministic(engines, drafter, budget, roomy=False)
    before = core.stats().num_preemptions
    same(together(core, kind), expected)
    assert core.stats().num_preemptions > before
    same(alone(core, kind), expected)
    same(alone(core, kind, events=True), expected)
