"""`outpace serve` whose engines only speak, the candidate's with flaws: `flawed_server.py FLAWS [options of serve]`.

FLAWS are options of `flawed_engine.py` in one word, such as "--factor 1.2"; empty: equal arms.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from server.api.event_loop import loop_factory
from server.api.lifecycle import Backend, Server
from server.api.load_text import load_text
from server.cli_options import add_options, parse_config
from server.config import ServerConfig
from server.engine.client import EngineClient

ENGINE = str(Path(__file__).with_name("flawed_engine.py"))


async def serve(config: ServerConfig, flaws: list[str]) -> None:
    """Serves until a signal."""
    backends = []
    for arm in config.all_arms:
        program = (ENGINE, *(flaws if arm.name == "candidate" else ()))
        client = EngineClient(arm.engine, program)
        backends.append(Backend(arm.engine, client, lambda: load_text(config.engine.model), arm.name))
    await Server(config, backends, "flawed", print).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = parse_config(parser.parse_args(sys.argv[2:]))
    logging.basicConfig(level=config.log_level.upper())
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(config, shlex.split(sys.argv[1])))


if __name__ == "__main__":
    main()
