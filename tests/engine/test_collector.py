"""The cyclic garbage collector has nothing to do while an engine runs, and next to nothing to look at."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from server.core import Request, SamplingParams
from server.engine.collector import THRESHOLDS, frozen_start
from tests.engine.tiny import engine, prompts, request

KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=1, top_p=0.8, logprobs=2),
    SamplingParams(temperature=1.1, seed=2, frequency_penalty=0.3, logit_bias={7: 2.0}),
]


def requests(count: int, seed: int) -> list[Request]:
    batch = prompts(count, seed=seed)
    return [
        request(
            f"{seed}.{i}",
            prompt,
            12,
            sampling=KINDS[i % 3],
            ignore_eos=i % 3 > 0,
            min_tokens=i % 4,
            prompt_logprobs=1 if i % 5 == 0 else None,
        )
        for i, prompt in enumerate(batch)
    ]


def serve(core: Any, count: int, seed: int) -> None:
    """Some are cancelled, some held back for a while; few blocks, so that some are preempted."""
    for req in requests(count, seed):
        assert core.submit(req) is None
    step = 0
    while core.has_work:
        step += 1
        if step % 7 == 0:
            core.abort(f"{seed}.{step % count}")
        core.hold(f"{seed}.{step % count + 1}")
        core.step()
        core.resume(f"{seed}.{step % count + 1}")


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix"])
def test_requests_leave_no_cycles(model: Any, drafter: str, overlapped: bool) -> None:
    core = engine(model, drafter, overlapped=overlapped, max_num_seqs=8, num_blocks=24)
    serve(core, 12, seed=1)  # what is made once and kept
    gc.collect()
    with frozen_start():
        gc.disable()
        try:
            serve(core, 150, seed=2)
            assert gc.collect() == 0
        finally:
            gc.enable()
    assert core.stats().num_preemptions > 0


def test_what_is_there_is_not_looked_at() -> None:
    before, thresholds = len(gc.get_objects()), gc.get_threshold()
    with frozen_start():
        assert len(gc.get_objects()) < before // 10
        assert gc.get_threshold() == THRESHOLDS
        loop: list[Any] = []
        loop.append(loop)
        del loop
        assert gc.collect() >= 1
    assert len(gc.get_objects()) > before // 2
    assert gc.get_threshold() == thresholds
