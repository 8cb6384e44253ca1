"""`outpace serve`: the real engine and the real text layer in one server, on uvloop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from server.api.interfaces import TextLayerLike
from server.api.lifecycle import Server, StartError
from server.api.text_layer import TextLayer
from server.config import ServerConfig
from server.engine.client import EngineClient
from server.models.source import resolve


def load_text(model: str) -> tuple[TextLayerLike, str]:
    """The text layer and the short name of a model. Raises ValueError with what is wrong with it."""
    source = resolve(model)
    return TextLayer(source.directory), source.name


def serve(config: ServerConfig, version: str) -> int:
    """Serves until a signal; the exit status."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            runner.run(_run(config, version))
        except StartError as error:
            print(f"outpace serve: {error}", file=sys.stderr)
            return 1
    return 0


async def _run(config: ServerConfig, version: str) -> None:
    engine = EngineClient(config.engine)
    await Server(config, engine, lambda: load_text(config.engine.model), version, _say).run()


def _say(line: str) -> None:
    print(line, flush=True)


def _loop_factory() -> Callable[[], Any] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform; asyncio's own loop serves as well, only slower
        return None
    return uvloop.new_event_loop
