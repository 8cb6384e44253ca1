"""Models that are optimised while the server serves: by a program of its own, one at a time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.config import EngineConfig

_LINE_BYTES = 1 << 20


class BuildError(RuntimeError):
    """There is no optimised model; the message is one line on why."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """How models are optimised. `command(settings, recipe)` prints on the last line of its standard output the
    directory of what it made, or found; `engine(settings, recipe, directory)` are settings of an engine that serves it.
    """

    command: Callable[[EngineConfig, str], Sequence[str]]
    engine: Callable[[EngineConfig, str, str], EngineConfig]


class Builds:
    """One build at a time: each holds the model in memory, and who comes second with the same recipe finds the first's
    artifact. Other servers on the machine are kept out by the artifact's own lock."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._lock = asyncio.Lock()

    async def made(self, config: EngineConfig, recipe: str) -> EngineConfig:
        """The settings with the artifact in place of the model. Raises BuildError, which ends with the command's words
        where the gate refused it."""
        async with self._lock:
            directory = await output_of(self._optimizer.command(config, recipe))
        return self._optimizer.engine(config, recipe, directory)


async def output_of(command: Sequence[str]) -> str:
    """The last line that the command prints; what it says on standard error is passed on. Raises BuildError with the
    last of that. Ends the command when it is cancelled."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, limit=_LINE_BYTES)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started: {error}") from error
    assert process.stdout is not None and process.stderr is not None
    try:
        output, last = await asyncio.gather(process.stdout.read(), _passed_on(process.stderr))
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    lines = output.decode(errors="replace").strip().splitlines()
    if status or not lines:
        raise BuildError(last or f"the build ended with status {status}")
    return lines[-1]


async def _passed_on(stream: asyncio.StreamReader) -> str:
    """The last line that is not empty, without the name of the command that said it."""
    last = ""
    while line := (await stream.readline()).decode(errors="replace"):
        print(line, end="", file=sys.stderr, flush=True)
        last = line.strip() or last
    return last.removeprefix("outpace optimize: ")
