"""`outpace serve`: the real engine and the real text layer in one server, on uvloop."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

from server.api.builds import BuildError, Builds, Optimizer
from server.api.event_loop import loop_factory
from server.api.experiment import settled
from server.api.interfaces import EngineClientLike
from server.api.lifecycle import Backend, Server
from server.api.load_text import load_text
from server.api.pool.owner import Pool
from server.api.starting import StartError
from server.api.successor import EngineRelay, Successor, succeeding
from server.config import NO_RECIPE, ArmConfig, ServerConfig
from server.engine.client import EngineClient
from server.models.source import resolve


def serve(
    config: ServerConfig, version: str, successor: Successor | None = None, optimizer: Optimizer | None = None
) -> int:
    """Serves until a signal; the exit status. `successor` is made meanwhile and takes over; `optimizer` makes what arms
    with a recipe serve."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            runner.run(_run(config, version, successor, optimizer))
        except StartError as error:
            print(f"outpace serve: {error}", file=sys.stderr)
            return 1
    return 0


async def _run(config: ServerConfig, version: str, successor: Successor | None, optimizer: Optimizer | None) -> None:
    builds = None if optimizer is None else Builds(optimizer)
    config = await _settled(config, builds)
    if config.api_workers > 1:
        await Pool(config, version, _say, builds=builds).run()
        return

    control, *others = config.all_arms
    backends = [_backend(arm, EngineClient(arm.engine)) for arm in others]
    if successor is None:
        first = _backend(control, EngineClient(control.engine))
        await Server(config, [first, *backends], version, _say, builds).run()
        return
    relay = EngineRelay(EngineClient(control.engine))
    async with succeeding(relay, successor, EngineClient, _say):
        await Server(config, [_backend(control, relay), *backends], version, _say, builds).run()


async def _settled(config: ServerConfig, builds: Builds | None) -> ServerConfig:
    """What is served after an experiment that is over. Raises StartError."""
    original = config.engine.model
    config, recipe = settled(config, _say)
    if recipe is None or recipe == NO_RECIPE:
        return config
    try:
        if builds is None:
            raise BuildError(f"recipe {recipe!r}: this server optimises nothing")
        engine = await builds.made(config.engine, recipe)
        name = config.served_model_name or resolve(original).name
    except (BuildError, ValueError) as error:
        raise StartError(str(error)) from error
    return replace(config, engine=engine, served_model_name=name)


def _backend(arm: ArmConfig, engine: EngineClientLike) -> Backend:
    """The text layer is the model's own: an optimised one's is a copy of it."""
    configure = engine.configure if isinstance(engine, EngineClient) else None
    return Backend(arm.engine, engine, lambda: load_text(arm.engine.model), arm.name, configure)


def _say(line: str) -> None:
    print(line, flush=True)
