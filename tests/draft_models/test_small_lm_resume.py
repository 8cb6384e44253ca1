"""The small-LM drafter after a pause: it computes what it lacks, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from draft_models import small_lm_device
from server.kernels.paged import PagedRows
from server.models.loader import load_model
from tests.draft_models.small_lm_world import World, greedy, ready


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


@pytest.mark.parametrize("size", [5, 16, 2048])
def test_a_pause_leaves_a_gap_that_resume_closes(
    model: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Slot by slot, several in a pass or all in one."""
    monkeypatch.setattr(small_lm_device, "CATCH_UP_CHUNK", size)
    world = ready(model, {0: 9, 1: 7})
    world.drafter.draft(world.step([0, 1]), 2)
    seen = [len(world.tokens[slot]) for slot in (0, 1)]
    world.drafter.pause()
    for slot in (0, 1):
        world.emit(slot, [9, 8, 7, 6, 5, 4, 3, 99 + slot])
    world.admit(2, 14)  # its prompt was never shown to the drafter
    world.emit(2, [11])
    world.drafter.resume([0, 1, 2], [world.tokens[s] for s in (0, 1, 2)], [*seen, 0])
    drafts = world.drafter.draft(world.step([0, 1, 2]), 3)
    assert drafts.tokens.tolist() == [greedy(reference, world.tokens[s], 3) for s in (0, 1, 2)]


@pytest.mark.parametrize("accepted", range(6))
def test_what_a_chain_left_is_taken_for_right_only_where_it_is(model: Any, reference: Any, accepted: int) -> None:
    """The host knows what was accepted, and says that all of it was seen; the last draft was never fed."""
    world = ready(model, {0: 9})
    drafts = world.drafter.draft(world.step([0]), 5)
    world.emit(0, [*drafts.tokens[0, :accepted].tolist(), 77])
    seen = len(world.tokens[0])
    world.emit(0, [5, 6, 7])
    world.drafter.resume([0], [world.tokens[0]], [seen])
    assert world.drafter.draft(world.step([0]), 3).tokens.tolist() == [greedy(reference, world.tokens[0], 3)]


def test_the_step_under_way_may_emit_a_token_that_resume_did_not_know(model: Any, reference: Any) -> None:
    world = ready(model, {0: 9})
    seen = len(world.tokens[0])
    world.emit(0, [5, 6, 7])
    known = world.tokens[0]
    world.emit(0, [8])
    world.drafter.resume([0], [known], [seen])
    assert world.drafter.draft(world.step([0]), 3).tokens.tolist() == [greedy(reference, world.tokens[0], 3)]


def test_only_what_is_missing_is_computed_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows of all slots, as many as fit a pass."""
    monkeypatch.setattr(small_lm_device, "CATCH_UP_CHUNK", 10)
    world = ready(model, {0: 9, 1: 5})
    seen = [len(world.tokens[slot]) for slot in (0, 1)]
    world.emit(0, [5, 6])
    world.emit(1, [7, 8, 9])
    world.admit(2, 4)
    passes: list[list[tuple[int, int]]] = []
    run = world.drafter.forward

    def counted(token_ids: Any, pools: Any, rows: PagedRows, *rest: Any) -> Any:
        assert rows.offsets is not None
        passes.append(list(zip(rows.slots.tolist(), rows.offsets.diff().tolist(), strict=True)))
        assert rows.max_width == max(width for _, width in passes[-1])
        return run(token_ids, pools, rows, *rest)

    monkeypatch.setattr(world.drafter, "forward", counted)
    world.drafter.resume([0, 1, 2], [world.tokens[slot] for slot in (0, 1, 2)], [*seen, 0])
    assert passes == [[(0, 4), (1, 5), (2, 1)], [(2, 3)]]
    world.drafter.resume([], [], [])
    assert len(passes) == 2


def test_resume_before_any_step_needs_the_tables(model: Any, reference: Any) -> None:
    world = World(model)
    world.admit(0, 8)
    with pytest.raises(RuntimeError, match="bind the block tables first"):
        world.drafter.resume([0], [world.tokens[0]], [0])
    world.drafter.bind(world.tables)
    world.emit(0, [12])
    world.drafter.resume([0], [world.tokens[0]], [0])
    assert world.drafter.draft(world.step([0]), 2).tokens.tolist() == [greedy(reference, world.tokens[0], 2)]
