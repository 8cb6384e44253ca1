"""`outpace serve` before an engine that only speaks: `scripted_server.py STEP_MS [options of outpace serve]`.

FIRST_MS/STEP_MS is an engine whose requests each have their own clock (`paced_engine.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from server.api.event_loop import loop_factory
from server.api.lifecycle import Backend, Server
from server.api.load_text import load_text
from server.api.pool.owner import Pool
from server.cli_options import add_options, parse_config
from server.config import ServerConfig
from server.engine.client import EngineClient

ENGINE = str(Path(__file__).with_name("scripted_engine.py"))
PACED = str(Path(__file__).with_name("paced_engine.py"))


async def serve(config: ServerConfig, step_ms: str) -> None:
    """Serves until a signal."""
    first_ms, slash, own_step_ms = step_ms.partition("/")
    program = (PACED, "--first-ms", first_ms, "--step-ms", own_step_ms) if slash else (ENGINE, "--step-ms", step_ms)
    if config.api_workers > 1:
        await Pool(config, "scripted", print, program).run()
        return
    backends = [
        Backend(arm.engine, EngineClient(arm.engine, program), lambda: load_text(config.engine.model), arm.name)
        for arm in config.all_arms
    ]
    await Server(config, backends, "scripted", print).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = parse_config(parser.parse_args(sys.argv[2:]))
    logging.basicConfig(level=config.log_level.upper())
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(config, sys.argv[1]))


if __name__ == "__main__":
    main()
