"""`outpace distill`: a drafter from the target's own words."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from optimize.distill.errors import DistillError, StoppedError
from optimize.distill.interrupt import listening
from optimize.distill.options import DistillOptions, parse_distill
from server.config import ConfigError
from server.engine.environment import engine_environment
from server.models.errors import ModelSourceError
from server.text.errors import ChatTemplateError, TokenizerError

INTERRUPTED = 130
"""The exit status of a program that SIGINT ended, as shells count."""


def run_distill(namespace: argparse.Namespace, arguments: Sequence[str], version: str) -> int:
    """Exit status: 0, 1 where no head could be made, 2 for a wrong option, 130 after Ctrl-C. Errors are one line."""
    try:
        options = parse_distill(namespace)
        os.environ.update(engine_environment())  # before torch is loaded, as in the engine's own process
        return _run(options, arguments, version)
    except ConfigError as error:
        return _failed(str(error), 2)
    except (DistillError, ModelSourceError, ChatTemplateError, TokenizerError, OSError) as error:
        return _failed(str(error), 1)
    except StoppedError as stop:
        return _failed(str(stop), INTERRUPTED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(options: DistillOptions, arguments: Sequence[str], version: str) -> int:
    from optimize.distill.run import distill  # loads torch
    from server.models.config import UnsupportedModelError
    from server.models.loader import WeightsError

    try:
        with listening() as stop:
            distill(options, arguments, version, _say, stop)
    except (UnsupportedModelError, WeightsError) as error:
        return _failed(str(error), 1)
    print(options.out)
    return 0


def _say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def _failed(reason: str, status: int) -> int:
    print(f"outpace distill: {' '.join(reason.split())}", file=sys.stderr)
    return status
