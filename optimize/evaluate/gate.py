"""Whether a candidate may take its original's place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from optimize.evaluate.options import DEFAULT_PARTS, EvaluateOptions
from optimize.evaluate.verdict import Number, Verdict
from optimize.recipe import GateThresholds, Recipe

__all__ = ["Number", "Verdict", "check", "gate_options"]

Say = Callable[[str], None]
Show = Callable[[str, float], None]


def gate_options(base: str, candidate: str | Path, gate: GateThresholds, device: str = "auto") -> EvaluateOptions:
    """What these thresholds ask for, and no more: speed at the numbers of sequences that are claimed on this device,
    the layers that cost most only where quality failed."""
    from server.models.loader import pick_device  # loads torch

    options = EvaluateOptions(str(base), str(candidate), tokens=gate.min_tokens, device=device, layers_if_worse=True)
    claimed = gate.on(pick_device(device).type).faster_at
    if not claimed:
        return replace(options, parts=tuple(part for part in DEFAULT_PARTS if part != "speed"))
    return replace(options, batch=claimed)


def check(
    base: str,
    candidate: str | Path,
    recipe: Recipe | None,
    options: EvaluateOptions | None = None,
    *,
    say: Say | None = None,
    show: Show | None = None,
) -> Verdict:
    """Holds `candidate` against `base` by the recipe's thresholds (None: the defaults), at bounds that say no when in
    doubt.

    `options` (None: `gate_options`) says on what and how to measure; their `base` and `candidate` do not count; with
    `out` a report is written there. `say` hears what happens (None: standard error), `show` how far a part is.

    Raises ConfigError, EvaluateError, and what finding and loading models raises.
    """
    from optimize.evaluate.report import write_report
    from optimize.evaluate.run import evaluate  # loads torch

    given = options or gate_options(base, candidate, recipe.gate if recipe else GateThresholds())
    given = replace(given, base=str(base), candidate=str(candidate))
    measured, verdict = evaluate(given, recipe, say or _to_standard_error, show or (lambda what, fraction: None))
    if given.out is not None:
        named = () if recipe is None else ("--recipe", recipe.name)
        write_report(given, recipe, measured, verdict, ("optimize", given.base, *named), _version())
    return verdict


def _to_standard_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _version() -> str:
    try:
        return metadata.version("outpace")
    except metadata.PackageNotFoundError:
        return "unknown"
