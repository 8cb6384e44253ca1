"""Runs requests through an engine and notes when its steps were over. Does next to nothing between two steps."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from server.bench.engine import Bench
from server.bench.options import Load
from server.bench.report import BenchError
from server.core import Request, SamplingParams, StepOutput

_GREEDY = SamplingParams(temperature=0.0)
_ids = itertools.count()
_WARM_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One load, timed from the first submission on.

    `seconds` is until the last output, `first_s` until the first. `step_s` are the times between outputs of steps in
    which every row decoded. `tokens_a_step` is emitted tokens by row and verify step, the prompts' first tokens apart;
    `num_verify_steps` is how many of those a row took on average.
    """

    seconds: float
    first_s: float
    step_s: list[float]
    num_tokens: int
    tokens_a_step: float
    num_verify_steps: float


def run(bench: Bench, load: Load, seed: int) -> Run:
    """Sends all of a load at once and steps until all is answered. Raises BenchError if a request fails."""
    requests = make_requests(load, bench.info.vocab_size, seed)
    gc.collect()
    synchronize(bench.device)
    core = bench.core
    outputs: list[list[StepOutput]] = []
    stamps: list[float] = []
    clock = time.perf_counter
    started = clock()
    for request in requests:
        refused = core.submit(request)
        if refused is not None:
            raise BenchError(f"load {load}: {refused.error}")
    while core.has_work:
        outputs.append(core.step())
        stamps.append(clock())
    synchronize(bench.device)
    core.check_integrity()
    return _summary(load, outputs, [stamp - started for stamp in stamps])


def _summary(load: Load, outputs: list[list[StepOutput]], stamps: list[float]) -> Run:
    told = [(stamp, step) for stamp, step in zip(stamps, outputs, strict=True) if step]
    failed = next((output.error for _, step in told for output in step if output.error), None)
    if failed is not None:
        raise BenchError(f"load {load}: {failed}")
    num_tokens = sum(len(output.token_ids) for _, step in told for output in step)
    if num_tokens != load.rows * load.output:
        raise BenchError(f"load {load}: {num_tokens} tokens came out instead of {load.rows * load.output}")
    row_steps = sum(len(step) for _, step in told) - load.rows  # each row's first output is its prompt's
    full = [stamp for stamp, step in told if len(step) == load.rows]
    return Run(
        seconds=told[-1][0],
        first_s=told[0][0],
        step_s=[b - a for a, b in itertools.pairwise(full)],
        num_tokens=num_tokens,
        tokens_a_step=(num_tokens - load.rows) / row_steps if row_steps else 0.0,
        num_verify_steps=row_steps / load.rows,
    )


def warm_up(bench: Bench, load: Load) -> None:
    """The same shapes with a short output, so that nothing is compiled or tuned while the clock runs."""
    run(bench, Load(load.rows, load.input, min(load.output, _WARM_TOKENS)), seed=0)


def make_requests(load: Load, vocab_size: int, seed: int) -> list[Request]:
    """Random prompts, greedy, blind to end-of-sequence."""
    draw = random.Random(seed)
    ids = range(vocab_size)
    return [
        Request(
            f"bench-{next(_ids)}",
            draw.choices(ids, k=load.input),
            _GREEDY,
            max_tokens=load.output,
            ignore_eos=True,
        )
        for _ in range(load.rows)
    ]


def seeds(repeats: int) -> Iterator[int]:
    """Other prompts for every repeat."""
    return iter(range(1, repeats + 1))


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; never called while the clock runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
