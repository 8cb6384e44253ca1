"""`outpace export`: a quantised model of ours for another engine. No torch before there is something to write."""

from __future__ import annotations

import argparse
import sys

from optimize.errors import OptimizeError
from optimize.export.engines import whole_table
from optimize.export.options import parse_export
from server.config import ConfigError
from server.models.errors import ModelSourceError


def run_export(namespace: argparse.Namespace) -> int:
    """Exit status: 0, 1 where nothing could be exported, 2 for a wrong option, 130 after Ctrl-C."""
    if getattr(namespace, "table", False):
        print("\n".join(whole_table()))
        return 0
    try:
        options = parse_export(namespace)
        options.directory()
        from optimize.export.run import export  # loads torch

        export(options, _say)
    except ConfigError as error:
        return _failed(str(error), 2)
    except (OptimizeError, ModelSourceError, OSError) as error:
        return _failed(str(error), 1)
    except KeyboardInterrupt:
        return _failed("stopped; nothing was written", 130)
    print(options.out)
    return 0


def _say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def _failed(reason: str, status: int) -> int:
    print(f"outpace export: {' '.join(reason.split())}", file=sys.stderr)
    return status
