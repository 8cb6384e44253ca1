"""Whether a candidate may take its original's place."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from optimize.evaluate.options import DEFAULT_PARTS, EvaluateOptions
from optimize.evaluate.thresholds import RecipeFacts
from optimize.evaluate.verdict import Number, Verdict

__all__ = ["Number", "Verdict", "check"]


def check(base: str, candidate: str | Path, thresholds: object, options: EvaluateOptions | None = None) -> Verdict:
    """Holds `candidate` against `base`, at bounds that say no when in doubt.

    `thresholds` are `Thresholds`, or a recipe: any object whose `gate` has their fields, and whose `name`, `method`,
    `weights`, `activations`, `group_size` and `minimum` advice may speak of. `options` says on what and how to measure
    (their `base` and `candidate` do not count); with `out` a report is written there. Progress goes to standard error.

    Raises ConfigError, EvaluateError, and what finding and loading models raises.
    """
    from optimize.evaluate.report import write_report
    from optimize.evaluate.run import evaluate  # loads torch

    facts = RecipeFacts.of(thresholds)
    given = options or EvaluateOptions(str(base), str(candidate), tokens=facts.gate.min_tokens)
    if options is None and not facts.gate.faster_at:
        given = replace(given, parts=tuple(part for part in DEFAULT_PARTS if part != "speed"))
    elif options is None:
        given = replace(given, batch=facts.gate.faster_at)
    given = replace(given, base=str(base), candidate=str(candidate))
    measured, verdict = evaluate(given, facts, lambda text: print(text, file=sys.stderr, flush=True))
    if given.out is not None:
        write_report(given, facts, measured, verdict)
    return verdict
