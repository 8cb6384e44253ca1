"""Draft lengths that are switched on a running engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import build
from benchmarks.text.closed_loop import Answer, closed_loop
from benchmarks.text.draft_length import DraftLengths
from server.core import Request, SamplingParams
from server.engine.core import EngineCore

PROMPT = [5, 6, 7, 8] * 6


@pytest.fixture
def core(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    return build(
        "ngram",
        model=str(tiny_llama_dir),
        device="cpu",
        prefix_cache=False,
        kv_cache_tokens=400,
        max_num_seqs=2,
        max_draft_tokens=5,
    )


def answer(core: EngineCore, max_tokens: int = 60) -> Answer:
    request = Request("x", PROMPT, SamplingParams(temperature=0.0), max_tokens=max_tokens, ignore_eos=True)
    pending, found = [request], []
    closed_loop(
        core, lambda: pending.pop() if pending else None, 1, lambda request, answer: found.append(answer), drain=True
    )
    assert isinstance(found[0], Answer)
    return found[0]


def test_the_text_is_the_same_and_the_length_what_was_asked(core: EngineCore) -> None:
    lengths = DraftLengths(core)
    assert lengths.tiers == (1, 2, 3, 5)
    said = []
    for k in (0, 5, 2, 0):
        lengths.fixed(k)
        found = answer(core)
        assert max(drafted for drafted, _ in found.verdicts) == k
        said.append(found.tokens)
    lengths.adaptive()
    said.append(answer(core).tokens)
    assert all(tokens == said[0] for tokens in said)


def test_without_drafts_the_drafter_does_not_run(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = DraftLengths(core)
    calls: list[str] = []
    drafter = core.runner.drafter
    for name in ("propose", "prefill", "commit"):
        whole = getattr(drafter, name)

        def spy(*arguments: Any, name: str = name, whole: Any = whole) -> Any:
            calls.append(name)
            return whole(*arguments)

        monkeypatch.setattr(drafter, name, spy)
    lengths.fixed(3)
    calls.clear()
    answer(core)
    assert {"propose", "prefill", "commit"} == set(calls)
    lengths.fixed(0)
    calls.clear()
    answer(core)
    assert calls == []
    lengths.fixed(3)
    calls.clear()
    answer(core, max_tokens=1)
    assert calls == ["prefill"]  # the first prompt after a pause is shown to the drafter


def test_the_engines_own_choice_comes_back(core: EngineCore) -> None:
    own, costs = core.speculation, core.speculation.costs
    assert costs is not None
    lengths = DraftLengths(core)
    lengths.fixed(2)
    assert core.speculation is not own
    assert own.costs is None  # a hybrid drafter asks it what to copy even so: nothing may follow from costs then
    answer(core)
    assert own.num_draft_steps == 0  # what fixed lengths show is not told to it
    lengths.adaptive()
    assert core.speculation is own
    assert own.costs is costs
    lengths.adaptive()
    assert own.costs is costs


def test_a_length_beyond_the_engines_is_refused(core: EngineCore) -> None:
    with pytest.raises(ValueError, match="k: 6 is not valid"):
        DraftLengths(core).fixed(6)
