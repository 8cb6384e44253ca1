"""After the verdict of an experiment whose plan says `retire`: the owner's engines, and when some may stop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from server.api.conclusion import GRACE_S, MAX_DRAIN_S
from server.config import CONTROL, ServerConfig, with_arms
from server.engine.supervisor import PING_INTERVAL_S, Supervisor
from server.routing.plan import Plan
from server.telemetry.metrics import Metrics


def conclude_engines(
    engines: dict[str, Supervisor], metrics: Metrics, plan: Plan, *, promoted: bool
) -> list[Supervisor]:
    """`engines` without candidate and baseline, a promoted candidate's in the control's place; those that leave."""
    candidate, baseline = engines.pop(plan.candidate), engines.pop(plan.baseline)
    leaving = [baseline, candidate]
    if promoted:
        leaving = [baseline, engines[CONTROL]]
        engines[CONTROL] = candidate
        metrics.take_over(CONTROL, plan.candidate, candidate)
    for engine in leaving:
        engine.on_up = engine.on_down = engine.on_stats = None
    for name in (plan.candidate, plan.baseline):
        metrics.forget_engine(name)
    return leaving


def concluded(config: ServerConfig, plan: Plan, control: Supervisor) -> ServerConfig:
    """What workers that start from now on are told: the arms that are left."""
    arms = tuple(arm for arm in config.arms if arm.name not in (plan.candidate, plan.baseline))
    return with_arms(config, arms, engine=control.config)


async def stop(engines: Sequence[Supervisor]) -> None:
    """Closes engines once they say that they are idle: their requests are the workers'."""
    loop = asyncio.get_running_loop()
    end = loop.time() + MAX_DRAIN_S
    await asyncio.sleep(GRACE_S + PING_INTERVAL_S)
    while loop.time() < end and any(_num_busy(engine) for engine in engines):  # noqa: ASYNC110 - pongs tell it
        await asyncio.sleep(PING_INTERVAL_S)
    await asyncio.gather(*(engine.close() for engine in engines))


def _num_busy(engine: Supervisor) -> int:
    stats = engine.connection.stats
    return stats.num_running + stats.num_waiting + stats.num_held if engine.ready else 0
