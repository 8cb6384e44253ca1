"""The arms beside the control, from their settings to engines that serve, while the control serves already.

recipe? ── built, one at a time ──┐
no recipe ────────────────────────┴─ started, one after the other: each measures what memory is left
an experiment's baseline waits for the candidate: without it there is nothing to compare
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from server.api.banner import summary
from server.api.builds import BuildError, Builds
from server.config import NO_RECIPE, ArmConfig, EngineConfig, ServerConfig
from server.engine.messages import EngineInfo
from server.routing.plan import Plan, plan_of

Start = Callable[[str, EngineConfig], Awaitable[EngineInfo]]
"""Starts the engine of the arm of that name with these settings. Raises StartError."""


class StartError(RuntimeError):
    """The server, or an arm, could not start; the message is one line for the person who typed the command."""


def pending(config: ServerConfig) -> set[str]:
    """Arms whose engines wait for a build."""
    waiting = {arm.name for arm in config.arms if arm.recipe not in (None, NO_RECIPE)}
    plan = None if config.experiment is None else plan_of(config.experiment)
    return waiting | ({plan.baseline} if plan is not None and plan.candidate in waiting else set())


class ArmStarts:
    """One run of it. `failed(arm, reason)` hears of arms that do not serve: their traffic is the control's.

    `plan` is the experiment's, if there is one; `builds` None: nothing can be optimised here.
    """

    def __init__(
        self,
        arms: Sequence[ArmConfig],
        plan: Plan | None,
        builds: Builds | None,
        *,
        start: Start,
        failed: Callable[[str, str], None],
        say: Callable[[str], None],
    ) -> None:
        self._arms, self._plan, self._builds = arms, plan, builds
        self._start, self._failed, self._say = start, failed, say
        self._starting = asyncio.Lock()
        self._settled = {arm.name: asyncio.Event() for arm in arms}
        self._served: set[str] = set()

    async def run(self) -> frozenset[str]:
        """Returns when every arm serves or will not; the names of those that do."""
        async with asyncio.TaskGroup() as group:
            for arm in self._arms:
                group.create_task(self._run(arm), name=f"start-{arm.name}")
        return frozenset(self._served)

    async def _run(self, arm: ArmConfig) -> None:
        try:
            await self._wait_for_candidate(arm.name)
            config = await self._prepared(arm)
            async with self._starting:
                self._say(f"Loading arm {arm.name}: {config.model}")
                info = await self._start(arm.name, config)
        except (StartError, BuildError) as error:
            self._failed(arm.name, str(error))
            self._say(f"Arm {arm.name} does not start: {error}; the control arm takes its share")
        else:
            self._served.add(arm.name)
            self._say(f"Arm {arm.name} serves: {summary(info)}")
        finally:
            self._settled[arm.name].set()

    async def _wait_for_candidate(self, name: str) -> None:
        plan = self._plan
        if plan is None or name != plan.baseline or plan.candidate not in self._settled:
            return
        await self._settled[plan.candidate].wait()
        if plan.candidate not in self._served:
            raise StartError(f"there is nothing to compare it with: arm {plan.candidate} does not serve")

    async def _prepared(self, arm: ArmConfig) -> EngineConfig:
        """The arm's settings, of the optimised model where it has a recipe. Raises BuildError."""
        if arm.recipe in (None, NO_RECIPE):
            return arm.engine
        if self._builds is None:
            raise BuildError(f"recipe {arm.recipe!r}: this server optimises nothing")
        self._say(f"Arm {arm.name}: {arm.engine.model} by recipe {arm.recipe}, made or found while the others serve")
        return await self._builds.made(arm.engine, arm.recipe)
