"""One place in the pool: a worker process, and another one whenever it dies."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable

import msgspec

from server.api.pool.messages import Assignment
from server.api.starting import StartError
from server.config import ServerConfig

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.25, 10.0


class Member:
    """Worker `index`. Every process has an identity of its own: messages for a dead one reach nobody.

    A worker that fails before it ever served makes `wait_ready` raise StartError; later ones are replaced after a pause
    that doubles from 0.25 s, until `stopping` is set.
    """

    def __init__(
        self, template: Assignment, on_spawn: Callable[[Member], None], on_death: Callable[[Member], None]
    ) -> None:
        self.index = template.index
        self.identity = b""
        self.model_name = ""
        self.idle = True
        self.stopping = False
        self.num_deaths = 0
        self.process: asyncio.subprocess.Process | None = None
        self._template = template
        self.assigned = template
        self._on_spawn = on_spawn
        self._on_death = on_death
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure: str | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the process and keeps one running."""
        self._task = asyncio.create_task(self._keep_alive(), name=f"api-worker-{self.index}")

    def assign(self, config: ServerConfig, counts: list[str]) -> None:
        """What the next process is started with."""
        self._template = msgspec.structs.replace(self._template, config=config, counts=counts)

    async def wait_ready(self) -> None:
        """Waits for the first readiness. Raises StartError with the worker's reason."""
        await asyncio.shield(self._ready)

    def on_hello(self, model_name: str) -> None:
        """It serves."""
        self.model_name = model_name
        if not self._ready.done():
            self._ready.set_result(None)

    def on_failed(self, reason: str) -> None:
        """It says why it ends."""
        self._failure = reason

    async def close(self, timeout_s: float) -> None:
        """It was told to end: waits for that, and kills it after `timeout_s`."""
        process = self.process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), timeout_s)
            except TimeoutError:
                logger.warning("API worker %d did not end within %g s and is killed", self.index, timeout_s)
                process.kill()
                await process.wait()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()

    async def _keep_alive(self) -> None:
        backoff = FIRST_BACKOFF_S
        while not self.stopping:
            loop = asyncio.get_running_loop()
            started = loop.time()
            try:
                code = await self._run_once()
                reason = self._failure or f"it ended unexpectedly (exit code {code})"
            except OSError as error:
                reason = f"it could not be started ({error})"
            if self.stopping:
                return
            if not self._ready.done():
                self._ready.set_exception(StartError(f"an API worker failed to start: {reason}"))
                return
            self.num_deaths += 1
            logger.error("API worker %d is gone: %s; another one starts", self.index, reason)
            if loop.time() - started > 60:
                backoff = FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    def _assignment(self) -> Assignment:
        return msgspec.structs.replace(self._template, identity=self.identity, replaces=self.num_deaths > 0)

    async def _run_once(self) -> int:
        self._failure = None
        self.identity = f"worker-{self.index}-{self.num_deaths}".encode()
        process = self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # never import from the directory the user happens to stand in
            "-m",
            "server.api.pool.worker",
            stdin=asyncio.subprocess.PIPE,
        )
        self._on_spawn(self)
        try:
            assert process.stdin is not None
            self.assigned = self._assignment()
            process.stdin.write(msgspec.json.encode(self.assigned))
            process.stdin.close()
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            self._on_death(self)
