"""What both models write to the same prompts, greedily, by their engines: decoding kernels and all."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from optimize.evaluate.errors import EvaluateError
from server.core import Request, SamplingParams, StepOutput
from server.engine.core import EngineCore

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Greedy:
    """`identical` is the share of prompts with the same answer; `first_divergence` the mean 0-based token at which the
    others part, None where there are none."""

    num_prompts: int
    max_tokens: int
    identical: float
    first_divergence: float | None


@dataclass(frozen=True, slots=True)
class Answers:
    """Tokens of every prompt's answer; of the verify steps behind the first tokens: rows' steps, drafts, and how many
    were accepted."""

    tokens: list[list[int]]
    num_steps: int
    num_drafted: int
    num_accepted: int


def answers(core: EngineCore, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answers:
    """Runs all prompts at once, as many as the engine takes. Raises EvaluateError if one fails."""
    names = [f"evaluate-{next(_ids)}" for _ in prompts]
    for name, ids in zip(names, prompts, strict=True):
        refused = core.submit(Request(name, list(ids), SamplingParams(temperature=0.0), max_tokens=max_tokens))
        if refused is not None:
            raise EvaluateError(f"a prompt of {len(ids)} tokens was refused: {refused.error}")
    outputs: list[StepOutput] = []
    while core.has_work:
        outputs += core.step()
    failed = next((output.error for output in outputs if output.error), None)
    if failed is not None:
        raise EvaluateError(f"a prompt failed: {failed}")
    found: dict[str, list[int]] = {name: [] for name in names}
    for output in outputs:
        found[output.request_id] += output.token_ids
    return Answers(
        tokens=[found[name] for name in names],
        num_steps=sum(1 for output in outputs if output.token_ids) - len(names),
        num_drafted=sum(output.num_drafted for output in outputs),
        num_accepted=sum(output.num_accepted for output in outputs),
    )


def agreement(base: Sequence[Sequence[int]], candidate: Sequence[Sequence[int]], max_tokens: int) -> Greedy:
    """Of answers to the same prompts. One that ends where the other goes on parts there."""
    parted = []
    for mine, theirs in zip(base, candidate, strict=True):
        if list(mine) != list(theirs):
            pairs = enumerate(zip(mine, theirs, strict=False))
            parted.append(next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs))))
    identical = 1 - len(parted) / len(base)
    return Greedy(len(base), max_tokens, identical, statistics.mean(parted) if parted else None)
