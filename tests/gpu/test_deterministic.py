"""Deterministic mode in bfloat16: the same bits whatever is drafted, batched, chunked, cached or preempted."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch

from server.core import Request, SamplingParams
from server.engine.core import EngineCore
from tests.engine.tiny import Answers, live, request
from tests.gpu.small import MIXED, Engines, Events, finish, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_PROMPTS = 32
NUM_ALONE = 4
LENGTH = 48
WHOLE, CHUNKED = 4096, 40
SMALL_CACHE = 1280
"""Tokens: fewer than 32 rows need, and room for the longest."""
KINDS: dict[str, tuple[SamplingParams, ...]] = {
    "greedy": (SamplingParams(temperature=0.0),),
    "seeded": (SamplingParams(temperature=0.9, seed=11, top_p=0.95),),
    "mixed": (*MIXED, SamplingParams(temperature=0.0, logprobs=2), SamplingParams(temperature=0.7, seed=5, top_p=0.9)),
}
"""How the requests of a batch are sampled, in turn. A mixed batch runs as its most demanding class, a request alone as
its own."""
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


@cache
def batch(kind: str) -> list[list[int]]:
    """Other prompts for every kind, so that none finds what another left in the prefix cache; two of them long."""
    seed = list(KINDS).index(kind)
    return [*prompts(NUM_PROMPTS - 2, seed, 17, 100), *prompts(2, seed + 100, 520, 720)]


def requests(kind: str, only: int | None = None) -> list[Request]:
    turns = KINDS[kind]
    return [
        request(f"r{i}", prompt, LENGTH, sampling=turns[i % len(turns)])
        for i, prompt in enumerate(batch(kind))
        if only is None or i == only
    ]


def together(core: EngineCore, kind: str) -> dict[int, Bits]:
    answers = finish(core, requests(kind))
    return {i: bits(answers, f"r{i}") for i in range(NUM_PROMPTS)}


def alone(core: EngineCore, kind: str, which: Iterable[int], *, aside: bool = False) -> dict[int, Bits]:
    """One after another; with `aside` each is set aside on its way, and computed anew."""
    found = {}
    for i in which:
        events: Events = {5: [("hold", f"r{i}")], 7: [("resume", f"r{i}")]} if aside else {}
        found[i] = bits(finish(core, requests(kind, i), events), f"r{i}")
    return found


FEW = range(NUM_PROMPTS - NUM_ALONE, NUM_PROMPTS)
"""Among them both long ones."""


def same(found: dict[int, Bits], expected: dict[int, Bits]) -> None:
    different = [i for i, value in found.items() if value != expected[i]]
    assert not different, f"{len(different)} of {len(found)} differ: {different}"


def deterministic(engines: Engines, drafter: str, budget: int, **limits: Any) -> EngineCore:
    return engines.get(
        drafter, 5, deterministic=True, max_num_seqs=NUM_PROMPTS, max_num_batched_tokens=budget, **limits
    )


@pytest.fixture(scope="module")
def expected(engines: Engines) -> dict[str, dict[int, Bits]]:
    """Plain, whole, without a prefix cache, each request alone."""
    core = deterministic(engines, "none", WHOLE)
    return {kind: alone(core, kind, range(NUM_PROMPTS)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [WHOLE, CHUNKED])
@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_bit_identical(
    engines: Engines, expected: dict[str, dict[int, Bits]], drafter: str, budget: int, kind: str
) -> None:
    """All together and some alone, each as prefix misses, then as prefix hits; set aside or not."""
    core = deterministic(engines, drafter, budget, prefix_cache=True)
    same(together(core, kind), expected[kind])
    assert core.stats().num_cached_tokens == 0
    same(together(core, kind), expected[kind])
    num_cached = core.stats().num_cached_tokens
    assert num_cached > 0
    same(alone(core, kind, FEW), expected[kind])
    same(alone(core, kind, FEW, aside=True), expected[kind])
    assert core.stats().num_cached_tokens > num_cached
    if drafter == "suffix":
        assert sum(core.stats().accepted_per_position) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [WHOLE, CHUNKED])
@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_bit_identical_without_a_prefix_cache(
    engines: Engines, expected: dict[str, dict[int, Bits]], drafter: str, budget: int, kind: str
) -> None:
    """With fewer blocks than all need together, so that some are preempted."""
    core = deterministic(engines, drafter, budget, kv_cache_tokens=SMALL_CACHE)
    same(together(core, kind), expected[kind])
    assert core.stats().num_preemptions > 0
    same(alone(core, kind, FEW), expected[kind])
    same(alone(core, kind, FEW, aside=True), expected[kind])


@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_bit_identical_whatever_happens(engines: Engines, expected: dict[str, dict[int, Bits]], drafter: str) -> None:
    """Requests come, are held, resumed and aborted at random, with chunks, prefix hits and preemption."""
    core = deterministic(engines, drafter, 96, kv_cache_tokens=SMALL_CACHE, prefix_cache=True)
    for seed, kind in enumerate(KINDS):
        answers, gone = live(core, requests(kind), random.Random(seed))
        finished = {i: bits(answers, f"r{i}") for i in range(NUM_PROMPTS) if f"r{i}" not in gone}
        same(finished, expected[kind])
