"""The small-LM drafter inside device steps: it drafts what its model would say, whatever was accepted before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.core import SamplingParams
from server.kernels.paged import PagedRows
from server.models.loader import load_model
from server.sampling.distribution import Processed
from server.sampling.state import SamplingBatch
from server.spec.types import Drafts, Layout, Verdict
from server.spec.verify import verify
from tests.draft_models.small_lm_world import BLOCK_SIZE, PADDING, World, greedy, ready


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    raw = json.loads((tiny_llama_dir / "config.json").read_text())
    return load_model(tiny_llama_dir, raw, torch.device("cpu"), torch.float32, 160)


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_llama_dir).eval()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_it_drafts_what_its_model_would_say(model: Any, reference: Any, k: int) -> None:
    world = ready(model, {0: 9, 2: 18, 1: 1})
    drafts = world.drafter.draft(world.step([0, 2, 1]), k)
    assert drafts.tokens.tolist() == [greedy(reference, world.tokens[s], k) for s in (0, 2, 1)]
    assert drafts.probs is None


@pytest.mark.parametrize("accepted", [0, 1, 3, 5])
def test_it_goes_on_from_whatever_was_committed(model: Any, reference: Any, accepted: int) -> None:
    """Of a chain that was accepted as a whole, the last draft was never fed."""
    world = ready(model, {0: 9, 2: 6})
    for k in (5, 1, 3):
        drafts = world.drafter.draft(world.step([2, 0]), k)
        assert drafts.tokens.tolist() == [greedy(reference, world.tokens[s], k) for s in (2, 0)]
        for row, slot in enumerate((2, 0)):
            world.emit(slot, [*drafts.tokens[row, : min(k, accepted)].tolist(), 77])


def test_prompt_chunks(model: Any, reference: Any) -> None:
    world = World(model)
    world.admit(1, 13)
    for size in (3, 5, 4, 1):
        world.prefill({1: size})
    assert world.drafter.draft(world.step([1]), 3).tokens.tolist() == [greedy(reference, world.tokens[1], 3)]


def test_limits_and_padding_rows(model: Any, reference: Any) -> None:
    world = ready(model, {0: 9, 1: 5})
    drafts = world.drafter.draft(world.step([1, 0, PADDING], [0, 2, 0]), 3)
    assert drafts.num_valid.tolist() == [0, 2, 0]
    assert drafts.tokens[0, :1].tolist() == greedy(reference, world.tokens[1], 1)
    assert drafts.tokens[1, :2].tolist() == greedy(reference, world.tokens[0], 2)
    assert all(bool(pool.isfinite().all()) for pool in world.drafter.pools)


def test_drafts_past_a_rows_limit_write_nothing(model: Any) -> None:
    """Behind a row's last block its table is stale: it names blocks that are others' by now."""
    world = ready(model, {0: 7, 1: 9})
    world.tables[0, 2:4] = world.tables[1, :2]  # 8 tokens are known, 8 places are slot 0's own
    world.tables[2, 0] = world.tables[1, 2]
    world.admit(2, 0)
    world.emit(2, [9])  # one token, so the window has nothing to run for its second
    before = [pool.clone() for pool in world.drafter.pools]
    world.drafter.draft(world.step([0, 2], [0, 0]), 5)
    spare = int(world.tables[1, 2]) * BLOCK_SIZE
    assert all(torch.equal(a[spare + 1], b[spare + 1]) for a, b in zip(world.drafter.pools, before, strict=True))
    for block in world.tables[1, :2].tolist():
        part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        assert all(torch.equal(a[part], b[part]) for a, b in zip(world.drafter.pools, before, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_target_that_is_its_own_drafter_accepts_everything(model: Any, temperature: float) -> None:
    """Greedy, and sampled with the same noise."""
    world = ready(model, {0: 9})
    step = world.step([0], temperature=temperature)
    drafts = world.drafter.draft(step, 5)
    verdict = judge(model, world, drafts, temperature)
    assert verdict.num_accepted.tolist() == [5]
    world.drafter.after_verify(step, drafts, verdict, None)
    tokens = drafts.tokens.clone()
    tokens[0, 2] = (tokens[0, 2] + 1) % 288
    spoiled = judge(model, world, Drafts(tokens, drafts.num_valid), temperature)
    assert spoiled.num_accepted.tolist() == [2]


def judge(model: Any, world: World, drafts: Drafts, temperature: float) -> Verdict:
    """Verifies row 0 (slot 0) with the target's own forward pass over the whole sequence."""
    from server.models.paging import Span, ragged_batch

    known = world.tokens[0]
    ids = torch.tensor(known + drafts.tokens[0].tolist())
    k = drafts.tokens.shape[1]
    pools = [torch.zeros_like(pool) for pool in world.drafter.pools]
    batch = ragged_batch([Span(0, len(ids), list(range(1, 16)), True)], BLOCK_SIZE)
    logits, _ = model.forward(ids, pools, batch, torch.arange(len(known) - 1, len(ids)))
    params = SamplingParams(temperature=temperature, seed=7)
    layout = Layout(torch.zeros(k + 1, dtype=torch.int64), torch.arange(k + 1), 1, k + 1)
    processed = Processed.dense(logits / (temperature or 1.0))
    return verify(
        processed, layout, drafts, SamplingBatch.of([params], 288), torch.tensor([len(known)]), rule="coupled"
    )


def test_rule_ratio_hands_over_the_distribution(model: Any) -> None:
    world = ready(model, {0: 9, 1: 4}, rule="ratio")
    drafts = world.drafter.draft(world.step([0, 1], temperature=0.8), 3)
    assert drafts.probs is not None and drafts.probs.shape == (2, 3, 288)
    torch.testing.assert_close(drafts.probs.sum(-1), torch.ones(2, 3))


class NoSync(TorchDispatchMode):
    """Fails on operators that make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.lstrip("_")
        assert not name.startswith(("item", "local_scalar_dense", "nonzero", "is_nonzero", "masked_select")), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean index synchronises"
        return func(*args, **(kwargs or {}))


def test_nothing_in_a_step_synchronises(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = ready(model, {0: 9, 1: 4}, rule="ratio")
    step = world.step([0, 1, PADDING], temperature=0.8)
    one = torch.ones(3, dtype=torch.int64)
    rows = PagedRows(
        slots=torch.tensor([2]),
        starts=torch.tensor([0]),
        block_tables=world.tables,
        block_size=BLOCK_SIZE,
        max_context=6,
        offsets=torch.tensor([0, 6], dtype=torch.int32),
        max_width=6,
    )

    def forward(*args: Any) -> Any:
        return torch.zeros(args[5].shape[0], 288), None

    monkeypatch.setattr(world.drafter, "forward", forward)
    ids = torch.arange(6)
    with NoSync():  # type: ignore[no-untyped-call]
        drafts = world.drafter.draft(step, 3)
        world.drafter.after_verify(step, drafts, Verdict(drafts.tokens, one, one), None)
        world.drafter.prefill_chunk(step, ids, rows, None)
        world.drafter.resume([0, 1], [world.tokens[slot] for slot in (0, 1)], [4, 0])


def test_chains_have_a_bound(model: Any) -> None:
    world = ready(model, {0: 9})
    with pytest.raises(ValueError, match="k: 0 is not valid; use 1 to 5"):
        world.drafter.draft(world.step([0]), 0)
