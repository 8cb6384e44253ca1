"""`outpace evaluate`: holds a candidate against its original."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from optimize.evaluate.errors import EvaluateError
from optimize.evaluate.options import EvaluateOptions, parse_evaluate
from optimize.evaluate.thresholds import RecipeFacts
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
        options, facts = parse_evaluate(namespace)
        os.environ.update(engine_environment())  # before torch is loaded, as in the engine's own process
        return _run(options, facts, arguments, version)
    except ConfigError as error:
        return _failed(str(error), 2)
    except (EvaluateError, BenchError, ModelSourceError, ChatTemplateError, TokenizerError, OSError) as error:
        return _failed(str(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(options: EvaluateOptions, facts: RecipeFacts, arguments: Sequence[str], version: str) -> int:
    from optimize.evaluate.report import summary_text, write_report
    from optimize.evaluate.run import evaluate  # loads torch
    from server.models.config import UnsupportedModelError
    from server.models.loader import WeightsError

    try:
        measured, verdict = evaluate(options, facts, _say)
    except (UnsupportedModelError, WeightsError) as error:
        return _failed(str(error), 1)
    print(summary_text(measured, verdict))
    if options.out is not None:
        for path in write_report(options, facts, measured, verdict, arguments, version):
            print(path)
    if verdict.passed or options.report_only:
        return 0
    return _failed(f"the candidate is refused: {'; '.join(verdict.reasons)}", REFUSED)


def _say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def _failed(reason: str, status: int) -> int:
    print(f"outpace evaluate: {' '.join(reason.split())}", file=sys.stderr)
    return status
