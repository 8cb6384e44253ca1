"""How many drafts each model accepts of the same drafter: it was trained on the base, and the candidate is another."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from draft_models.packaged import packaged_head
from optimize.evaluate.greedy import answers
from optimize.evaluate.options import EvaluateOptions
from optimize.evaluate.sides import start_drafting
from server.bench.options import Load
from server.config import ConfigError, EngineConfig
from server.models.config import LLAMA_FAMILY, architecture_of
from server.models.source import ModelSource


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of one model. `acceptance_rate`: share of drafts accepted; `emitted_per_step`: with the bonus token."""

    num_steps: int
    num_drafted: int
    acceptance_rate: float
    emitted_per_step: float


@dataclass(frozen=True, slots=True)
class Drafting:
    """Both models with drafter `name`, `max_draft_tokens` drafts a step. `ratio` is the candidate's acceptance rate as
    a multiple of the base's (1 where neither accepts any)."""

    name: str
    max_draft_tokens: int
    base: Acceptance
    candidate: Acceptance

    @property
    def ratio(self) -> float:
        mine, theirs = self.base.acceptance_rate, self.candidate.acceptance_rate
        return theirs / mine if mine else 1.0


def find_drafter(options: EvaluateOptions, base: ModelSource) -> Path | None:
    """The drafter's directory, None where there is none to measure. Raises ConfigError."""
    if options.drafter == "none":
        return None
    if options.drafter == "auto":
        return packaged_head(base.name) if base.kind == "embedded" else None
    path = Path(options.drafter).expanduser()
    if not (path / "config.json").is_file():
        raise ConfigError(f"drafter: {options.drafter!r} is not valid; use auto, none or a drafter's directory")
    return path


def drafting(
    options: EvaluateOptions,
    head: Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    say: Callable[[str], None],
    show: Callable[[str, float], None],
) -> Drafting:
    """Both models answer the prompts greedily with drafts, one engine after the other.

    Greedy answers of two models differ, so each is measured on what it writes itself, as in serving.
    """
    found: list[Acceptance] = []
    for spec, weights in ((options.base, options.base_weights), (options.candidate, options.candidate_weights)):
        show(f"drafter {head.name}", len(found) / 2)
        found.append(acceptance(options, spec, weights, head, prompts, max_tokens, say))
    show(f"drafter {head.name}", 1.0)
    return Drafting(head.name, options.max_draft_tokens, *found)


def acceptance(
    options: EvaluateOptions,
    spec: str,
    weights: str,
    head: Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    say: Callable[[str], None],
) -> Acceptance:
    """Of one model, by name and form of its weights."""
    config = EngineConfig(
        model=spec,
        weights=weights,
        device=options.device,
        dtype=options.dtype,
        drafter=_kind(head),
        draft_model=str(head),
        max_draft_tokens=options.max_draft_tokens,
        adaptive=False,
        prefix_cache=False,
    )
    bench = start_drafting(options, config, [Load(len(prompts), max(map(len, prompts)), max_tokens)], say)
    got = answers(bench.core, prompts, max_tokens)
    steps = max(1, got.num_steps)
    rate = got.num_accepted / max(1, got.num_drafted)
    emitted = (sum(map(len, got.tokens)) - len(prompts)) / steps
    del bench
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Acceptance(got.num_steps, got.num_drafted, rate, emitted)


def _kind(head: Path) -> str:
    raw = json.loads((head / "config.json").read_text(encoding="utf-8"))
    plain = architecture_of(raw) in LLAMA_FAMILY and "draft_vocab_size" not in raw and "eagle_config" not in raw
    return "small-lm" if plain else "eagle3"
