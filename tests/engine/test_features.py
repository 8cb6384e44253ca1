"""The carry's features: what an EAGLE-3 head starts from must be those of the last token in the KV pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from server.models.paging import Span, ragged_batch
from server.sampling.state import SamplingBatch
from server.spec.types import Carry, Drafts, Verdict
from tests.engine.tiny import Scripted, engine, prompts, request, run, runner_of

LAYERS = (0, 1)


class Watching(Scripted):
    """Drafts by a script and notes the features that it was given, by number of known tokens."""

    feature_layers: tuple[int, ...] = LAYERS

    def __init__(self, whole: list[int]) -> None:
        # every other draft is wrong, so that steps accept different numbers of drafts
        super().__init__(
            lambda tokens, k: [t if i % 2 == 0 else (t + 1) % 64 for i, t in enumerate(whole[len(tokens) :][:k])]
        )
        self.seen: dict[int, Tensor] = {}
        self.committed: list[tuple[int, ...]] = []

    def propose(self, carry: Carry, k: int, sampling: SamplingBatch) -> Drafts:
        assert carry.features is not None
        self.seen[carry.tokens_host[0]] = carry.features[0].clone()
        return super().propose(carry, k, sampling)

    def commit(self, carry: Carry, drafts: Drafts, verdict: Verdict, features: Tensor | None) -> None:
        assert features is not None
        self.committed.append(tuple(features.shape))


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("budget", [7, 64])
def test_features_are_those_of_the_last_computed_token(model: Any, greedy: Any, ragged: bool, budget: int) -> None:
    prompt = prompts(1, low=20, high=21)[0]
    whole = [*prompt, *greedy(prompt, 24)]
    drafter = Watching(whole)
    core = engine(model, drafter, 3, ragged=ragged, budget=budget, prefix_cache=False)
    assert run(core, [request("r", prompt, 24)])["r"] == whole[len(prompt) :]
    pools = [torch.zeros_like(pool) for pool in runner_of(core).pools]
    batch = ragged_batch([Span(0, len(whole), list(range(1, 20)), True)], core.runner.shape.block_size)
    _, expected = model.forward(torch.tensor(whole), pools, batch, torch.arange(1), LAYERS)
    assert len(drafter.seen) > 5
    for num_tokens, features in drafter.seen.items():
        torch.testing.assert_close(features, expected[num_tokens - 2], rtol=1e-4, atol=1e-4)
    assert {shape[0] for shape in drafter.committed} == {1}
    assert len({shape[1] for shape in drafter.committed}) >= 1
