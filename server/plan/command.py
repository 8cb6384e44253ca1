"""`outpace plan`: what memory goes where, before anything is loaded."""

from __future__ import annotations

import argparse
import sys

from server.config import ConfigError
from server.models.errors import ModelSourceError
from server.plan.options import parse_plan


def run_plan(namespace: argparse.Namespace) -> int:
    """Exit status: 0 if the engine fits, 1 if it does not or no plan can be made, 2 for a wrong option."""
    try:
        options = parse_plan(namespace)
        from server.plan.run import UNUSABLE, print_plan  # loads torch

        try:
            return 0 if print_plan(options) else 1
        except UNUSABLE as error:
            return _failed(str(error), 1)
    except ConfigError as error:
        return _failed(str(error), 2)
    except ModelSourceError as error:
        return _failed(str(error), 1)


def _failed(reason: str, status: int) -> int:
    print(f"outpace plan: {' '.join(reason.split())}", file=sys.stderr)
    return status
