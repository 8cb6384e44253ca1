"""On a GPU nothing in the sampling of a step may wait for a result: run it on the meta device, which holds no data.

Whatever is not the CPU takes the GPU's path. Reading a value (`.item()`, `bool(tensor)`) or a shape that depends on
data (`nonzero`, a boolean index) raises there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from server.core import SamplingParams
from server.sampling.logprobs import emitted_logprobs
from server.sampling.process import process
from server.sampling.state import SamplingBatch, SamplingState
from server.spec.types import Drafts, Layout, SlotState
from server.spec.verify import draft_token, verify

R, K, V = 3, 4, 640
EVERYTHING = SamplingParams(
    temperature=0.8, top_k=300, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2,
    frequency_penalty=0.1, logit_bias={5: 1.0}, logprobs=3,
)  # fmt: skip
BATCHES = {
    "greedy": [SamplingParams(temperature=0.0)] * R,
    "temperature": [SamplingParams()] * R,
    "top_p": [SamplingParams(top_p=0.9)] * R,
    "mixed": [SamplingParams(temperature=0.0), SamplingParams(), EVERYTHING],
}


def on_meta(batch: SamplingBatch) -> SamplingBatch:
    tensors = {f.name: v.to("meta") for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors)  # type: ignore[arg-type]


def ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("sync", [
    lambda x: bool(x[0] > 0), lambda x: x[0].item(), lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: x[x > 0],
])  # fmt: skip
def test_the_meta_device_notices_a_sync(sync: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        sync(ints(1))


@pytest.mark.parametrize("rule", ["coupled", "ratio"])
@pytest.mark.parametrize("k", [0, K])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("with_probs", [False, True])
def test_a_step_never_syncs(rule: str, k: int, kind: str, with_probs: bool) -> None:
    sampling = SamplingState(R, V, torch.device("cpu"))
    for slot, params in enumerate(BATCHES[kind]):
        sampling.set(slot, params, 0, min_tokens=4 if kind in ("greedy", "mixed") else 0, end_ids=[2, 7])
    batch = on_meta(sampling.gather(list(range(R)), torch.arange(R)))
    assert (batch.end_ids is not None) == (kind in ("greedy", "mixed"))
    state = SlotState(ints(8, 64), ints(8), ints(8))
    layout = Layout(ints(R * (k + 1)), ints(R * (k + 1)), R, k + 1)
    drafts = Drafts(ints(R, k), ints(R), probs=torch.rand(R, k, V, device="meta") if with_probs else None)
    logits = torch.randn(R * (k + 1), V, device="meta")
    processed = process(logits, layout, drafts, batch, state, ints(R), 32)
    verdict = verify(processed, layout, drafts, batch, ints(R), rule)
    scored = emitted_logprobs(logits, layout, verdict, 3)
    assert verdict.tokens.shape == (R, k + 1) and verdict.tokens.is_meta
    assert scored.top_ids.shape == (R, k + 1, 3) and scored.chosen.is_meta
    if k == 0:
        drawn, _ = draft_token(processed, batch, ints(R), rule)
        assert drawn.shape == (R,) and drawn.is_meta
