"""Measures everything that was asked for, cheapest refusals first: settings, text, networks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from optimize.evaluate.advice import advice
from optimize.evaluate.drafter import Drafting, drafting, find_drafter
from optimize.evaluate.greedy import Greedy, agreement, answers
from optimize.evaluate.layers import Sensitivity, sensitivity
from optimize.evaluate.options import EvaluateOptions
from optimize.evaluate.prompts import prompt_ids
from optimize.evaluate.quality import Positions, Quality, read_both, summary
from optimize.evaluate.reader import Reader, tokens_a_step
from optimize.evaluate.sides import Pair, Side, Size, find_pair, size, start
from optimize.evaluate.speed import TierSpeed, speeds
from optimize.evaluate.texts import Window, encode, read_texts, shortened, windows
from optimize.evaluate.verdict import Verdict, judged
from optimize.recipe import GateThresholds, Recipe
from server.bench.options import Load
from server.config import ConfigError
from server.models.loader import pick_device

Say = Callable[[str], None]
Show = Callable[[str, float], None]
"""Called with what is being done and which fraction of it is done."""

GREEDY_TOKENS = 64
TASK_ROWS, TASK_TOKENS = 8, 4096


@dataclass(slots=True)
class Measured:
    """What was found; None and empty what was not asked for or cannot be had. `seconds` by part."""

    pair: Pair
    device: torch.device
    dtypes: tuple[str, str]
    paths: tuple[str, str]
    sizes: tuple[Size, Size]
    num_documents: int = 0
    positions: Positions | None = None
    quality: Quality | None = None
    greedy: Greedy | None = None
    speeds: list[TierSpeed] = field(default_factory=list)
    drafting: Drafting | None = None
    layers: Sensitivity | None = None
    tasks: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def evaluate(
    options: EvaluateOptions, recipe: Recipe | None, say: Say, show: Show = lambda what, fraction: None
) -> tuple[Measured, Verdict]:
    """By the recipe's thresholds (None: the defaults). Raises ConfigError, EvaluateError, and what finding and loading
    models raises."""
    gate = (recipe.gate if recipe is not None else GateThresholds()).on(pick_device(options.device).type)
    recipe = None if recipe is None else replace(recipe, gate=gate)
    if options.tokens < gate.min_tokens and not options.report_only:
        raise ConfigError(
            f"tokens: {options.tokens} is not valid; the gate asks for {gate.min_tokens}; --report-only does without"
        )
    measured = _measure(options, gate, say, show)
    numbers = judged(measured.quality, measured.speeds, measured.drafting, gate)
    failed = [number for number in numbers if not number.passed]
    head = measured.drafting.name if measured.drafting is not None else None
    return measured, Verdict(numbers, tuple(advice(failed, recipe, measured.layers, head)))


def _measure(options: EvaluateOptions, gate: GateThresholds, say: Say, show: Show) -> Measured:
    texts = read_texts(options.text)
    pair = find_pair(options, [text for _, text in texts[:: max(1, len(texts) // 16)]])
    head = find_drafter(options, pair.base) if "drafter" in options.parts else None
    documents = shortened(encode(texts, pair.tokenizer), options.tokens)
    read = windows(documents, options.window)
    prompts = prompt_ids(pair.tokenizer)
    tiers = sorted({*options.batch, *gate.faster_at})
    timed = [Load(tier, options.input, options.output) for tier in tiers] if "speed" in options.parts else []
    talk = Load(len(prompts), max(map(len, prompts)), GREEDY_TOKENS)
    loads = [talk, *timed, *([_task_load(pair)] if "tasks" in options.parts else [])]
    base, candidate = start(options, pair, loads, say)
    found = Measured(
        pair,
        pick_device(options.device),
        (base.bench.info.dtype, candidate.bench.info.dtype),
        (base.bench.info.linear_path, candidate.bench.info.linear_path),
        (size(base), size(candidate)),
        num_documents=len(documents),
    )
    _with_both(options, gate, found, base, candidate, read, prompts, timed, say, show)
    del base, candidate
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if head is not None:
        with _Clock(found, "drafter"):
            found.drafting = drafting(options, head, prompts, GREEDY_TOKENS, say, show)
    return found


def _task_load(pair: Pair) -> Load:
    """Prompts with examples are long."""
    context = int(pair.base.config.get("max_position_embeddings") or TASK_TOKENS)
    return Load(TASK_ROWS, min(TASK_TOKENS, context) - 1, 1)


def _with_both(
    options: EvaluateOptions,
    gate: GateThresholds,
    found: Measured,
    base: Side,
    candidate: Side,
    read: Sequence[Window],
    prompts: Sequence[Sequence[int]],
    timed: Sequence[Load],
    say: Say,
    show: Show,
) -> None:
    """What needs both networks at once."""
    if "quality" in options.parts:
        with _Clock(found, "quality"):
            found.positions = read_text(base, candidate, read, options.window, show)
        found.quality = summary(found.positions, gate.confidence)
    if "greedy" in options.parts:
        with _Clock(found, "greedy"):
            show("greedy answers", 0.0)
            mine = answers(base.bench.core, prompts, GREEDY_TOKENS).tokens
            show("greedy answers", 0.5)
            theirs = answers(candidate.bench.core, prompts, GREEDY_TOKENS).tokens
            show("greedy answers", 1.0)
        found.greedy = agreement(mine, theirs, GREEDY_TOKENS)
    if timed:
        with _Clock(found, "speed"):
            found.speeds = speeds(base.bench, candidate.bench, timed, options.repeats, show)
    if "tasks" in options.parts:
        from optimize.evaluate.tasks import run_tasks  # needs lm-eval

        with _Clock(found, "tasks"):
            found.tasks = run_tasks(options, (base, candidate), found.pair.tokenizer, say)
    if "layers" in options.parts and not (options.layers_if_worse and _is_good(found.quality, gate)):
        with _Clock(found, "layers"):
            shown = partial(_share, show, "layers one by one")
            found.layers = sensitivity(base.model, candidate.model, read, options.layer_seconds, shown)


def read_text(base: Side, candidate: Side, read: Sequence[Window], longest: int, show: Show) -> Positions:
    """Both on the same windows."""
    tokens = tokens_a_step(base.model.vocab_size, base.model.device)
    readers = [Reader(side.model, longest, tokens, side.forward, side.kv_dtype) for side in (base, candidate)]
    return read_both(readers[0], readers[1], read, tokens, partial(_share, show, "reading text"))


def _is_good(quality: Quality | None, gate: GateThresholds) -> bool:
    return quality is not None and all(
        number.passed for number in judged(quality, [], None, replace(gate, faster_at=()))
    )


class _Clock:
    """Notes how long a part took."""

    def __init__(self, found: Measured, part: str) -> None:
        self._found, self._part = found, part

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._found.seconds[self._part] = round(time.perf_counter() - self._started, 2)


def _share(show: Show, what: str, done: int, total: int) -> None:
    show(what, done / total)
