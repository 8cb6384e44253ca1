"""A request whose numbers overflow fails alone: its blocks are cleaned before anybody else gets them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.core import FinishReason
from tests.engine.tiny import engine, prompts, request, run, runner_of

POISON = 7


@pytest.fixture
def poisoned(model: Any) -> Any:
    """The model, with an embedding that is not a number."""
    kept = model.embedding[POISON].clone()
    model.embedding[POISON] = torch.nan
    yield model
    model.embedding[POISON] = kept


def clean(prompt: list[int]) -> list[int]:
    return [token if token != POISON else POISON + 1 for token in prompt]


@pytest.mark.parametrize("ragged", [True, False])
def test_not_a_number_ends_its_own_request_and_reaches_no_other(poisoned: Any, ragged: bool) -> None:
    good = clean(prompts(1)[0])
    expected = run(engine(poisoned, ragged=ragged), [request("good", good)])["good"]
    assert POISON not in expected, "the answer itself must not contain the poison"
    core = engine(poisoned, ragged=ragged)
    bad = [*good, POISON, *good]
    outputs = list(core.generate([request("bad", bad), request("beside", good)]))
    last = {o.request_id: o for o in outputs if o.finish_reason is not None}
    assert last["bad"].finish_reason is FinishReason.ERROR
    assert "not finite" in (last["bad"].error or "")
    assert [t for o in outputs if o.request_id == "beside" for t in o.token_ids] == expected
    assert run(core, [request("after", good)])["after"] == expected
    assert all(pool.isfinite().all() for pool in runner_of(core).pools)
    core.check_integrity()


def test_what_it_computed_is_not_found_by_a_prefix_hit(poisoned: Any) -> None:
    core = engine(poisoned)
    bad = [POISON, *clean(prompts(1, low=40, high=41)[0])]
    (output,) = core.generate([request("bad", bad)])
    assert output.finish_reason is FinishReason.ERROR
    assert core.scheduler.cache.match(bad, len(bad) - 1) == ([], [])


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_one_step_late_too(poisoned: Any, prompt_logprobs: int | None) -> None:
    """Also where the prompt's own tokens are scored, and only what follows them is not a number."""
    good = clean(prompts(1)[0])
    core = engine(poisoned, overlapped=True)
    outputs = list(core.generate([request("bad", [*good, POISON], prompt_logprobs=prompt_logprobs)]))
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert run(core, [request("after", good)])["after"] == run(engine(poisoned), [request("good", good)])["good"]
