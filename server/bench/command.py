"""`outpace bench`: the engine without HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from server.bench.options import BenchOptions, parse_bench
from server.bench.report import BenchError
from server.config import ConfigError
from server.engine.environment import engine_environment
from server.models.errors import ModelSourceError

INTERRUPTED = 130
"""The exit status of a program that SIGINT ended, as shells count."""
_CUPTI = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
"""CUPTI, once torn down after a first profile, does not get along with CUDA graphs."""


def run_bench(namespace: argparse.Namespace, arguments: Sequence[str], version: str) -> int:
    """Exit status: 0, 1 where a measurement failed, 2 for a wrong option, 130 after Ctrl-C. Errors are one line."""
    try:
        options = parse_bench(namespace)
        os.environ.update(engine_environment())  # before torch is loaded, as in the engine's own process
        if options.profile is not None:
            os.environ.update(_CUPTI)
        return _run(options, arguments, version)
    except ConfigError as error:
        return _failed(str(error), 2)
    except (BenchError, ModelSourceError) as error:
        return _failed(str(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(options: BenchOptions, arguments: Sequence[str], version: str) -> int:
    from server.bench.run import run_all  # loads torch

    run_all(options, arguments, version, _say)
    return 0


def _say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def _failed(reason: str, status: int) -> int:
    print(f"outpace bench: {' '.join(reason.split())}", file=sys.stderr)
    return status
