"""Steps of both engines side by side: they take turns, so a machine that grows slower does so for both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optimize.evaluate.errors import EvaluateError
from server.bench.drive import Run, run, seeds, warm_up
from server.bench.engine import Bench
from server.bench.options import Load
from server.bench.report import Spread


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """`batch` sequences at once. A step's milliseconds (a run's median step; median and range of the runs) and output
    tokens a second of the whole load, its prompts included. `ratio`: candidate's by base's time of a step, in pairs of
    runs that followed each other."""

    batch: int
    load: str
    base_ms: Spread
    candidate_ms: Spread
    ratio: Spread
    base_tok_s: Spread
    candidate_tok_s: Spread


def speeds(
    base: Bench, candidate: Bench, loads: Sequence[Load], repeats: int, show: Callable[[str, float], None]
) -> list[TierSpeed]:
    """Every load on both, alternating who goes first. Raises BenchError, or EvaluateError for a load without steps."""
    return [_tier(base, candidate, load, repeats, show) for load in loads]


def _tier(base: Bench, candidate: Bench, load: Load, repeats: int, show: Callable[[str, float], None]) -> TierSpeed:
    what = f"timing {load.rows} sequence{'s' if load.rows > 1 else ''}"
    show(what, 0.0)
    for bench in (base, candidate):
        warm_up(bench, load)
    runs: list[tuple[Run, Run]] = []
    for seed in seeds(repeats):
        if seed % 2:
            mine = run(base, load, seed)
            runs.append((mine, run(candidate, load, seed)))
        else:
            theirs = run(candidate, load, seed)
            runs.append((run(base, load, seed), theirs))
        show(what, len(runs) / repeats)
    times = [(_step_ms(mine), _step_ms(theirs)) for mine, theirs in runs]
    return TierSpeed(
        batch=load.rows,
        load=str(load),
        base_ms=Spread.of([mine for mine, _ in times]),
        candidate_ms=Spread.of([theirs for _, theirs in times]),
        ratio=Spread.of([theirs / mine for mine, theirs in times]),
        base_tok_s=Spread.of([mine.num_tokens / mine.seconds for mine, _ in runs]),
        candidate_tok_s=Spread.of([theirs.num_tokens / theirs.seconds for _, theirs in runs]),
    )


def _step_ms(found: Run) -> float:
    if not found.step_s:
        raise EvaluateError("output: too few tokens; no step in which every sequence decoded was timed")
    return 1e3 * statistics.median(found.step_s)
