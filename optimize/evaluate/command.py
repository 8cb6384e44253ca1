"""`outpace evaluate`: holds a candidate against its original."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from optimize.evaluate.errors import EvaluateError
from optimize.evaluate.options import EvaluateOptions, parse_evaluate
from optimize.progress import Bar
from optimize.recipe import Recipe
from server.bench.report import BenchError
from server.config import ConfigError
from server.engine.environment import engine_environment
from server.models.errors import ModelSourceError
from server.text.errors import ChatTemplateError, TokenizerError

REFUSED, INTERRUPTED = 3, 130


def run_evaluate(namespace: argparse.Namespace, arguments: Sequence[str], version: str) -> int:
    """Exit status: 0, 3 where the candidate is refused, 1 where they cannot be compared, 2 for a wrong option, 130
    after Ctrl-C. Errors are one line."""
    try:
        options, recipe = parse_evaluate(namespace)
        os.environ.update(engine_environment())  # before torch is loaded, as in the engine's own process
        return _run(options, recipe, arguments, version)
    except ConfigError as error:
        return _failed(str(error), 2)
    except (EvaluateError, BenchError, ModelSourceError, ChatTemplateError, TokenizerError, OSError) as error:
        return _failed(str(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(options: EvaluateOptions, recipe: Recipe | None, arguments: Sequence[str], version: str) -> int:
    from optimize.evaluate.report import summary_text, write_report
    from optimize.evaluate.run import evaluate  # loads torch
    from server.models.config import UnsupportedModelError
    from server.models.loader import WeightsError

    bar = Bar()
    try:
        measured, verdict = evaluate(options, recipe, bar.line, bar)
    except (UnsupportedModelError, WeightsError) as error:
        return _failed(str(error), 1)
    print(summary_text(measured, verdict))
    if options.out is not None:
        for path in write_report(options, recipe, measured, verdict, ["evaluate", *arguments], version):
            print(path)
    if verdict.passed or options.report_only:
        return 0
    return _failed(f"the candidate is refused: {'; '.join(verdict.reasons)}", REFUSED)


def _failed(reason: str, status: int) -> int:
    print(f"outpace evaluate: {' '.join(reason.split())}", file=sys.stderr)
    return status
