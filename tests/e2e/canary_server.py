"""`canary_server.py ARTIFACT [options of outpace serve]`: as with --optimize-in-background, by a build that finds
ARTIFACT, a copy of the model, at once."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from optimize.canary import with_canary
from server.api.builds import Optimizer
from server.api.serve import serve
from server.cli_options import add_options, parse_config
from server.config import EngineConfig


def main() -> int:
    artifact = sys.argv[1]
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = with_canary(parse_config(parser.parse_args(sys.argv[2:]), canary=True), "fp8", "artifact-1")

    def engine(settings: EngineConfig, recipe: str, directory: str) -> EngineConfig:
        return replace(settings, model=directory)

    command = [sys.executable, "-c", f"print({artifact!r})"]
    return serve(config, "test", None, Optimizer(lambda settings, recipe: command, engine))


if __name__ == "__main__":
    sys.exit(main())
