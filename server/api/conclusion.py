"""An experiment whose plan says `retire` is over: one engine goes on, as the control, and the others are stopped.

promoted:    control's engine ── drains ── closed      rolled back: control's engine ── serves on
             candidate's ── is the control's now                    candidate's ── drains ── closed
             baseline's ── drains ── closed                         baseline's ── drains ── closed
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from server.api.interfaces import EngineClientLike
from server.api.state import ServerState
from server.routing.plan import Plan

GRACE_S = 2.0
"""A request that was routed before may still be on its way to the engine."""
MAX_DRAIN_S = 3600.0


def conclude(state: ServerState, plan: Plan, *, promoted: bool) -> list[EngineClientLike]:
    """The arms of this process without candidate and baseline; the engines that nobody is sent to any more."""
    arms, metrics = state.arms, state.metrics
    control, candidate = arms.control, arms.named(plan.candidate)
    gone = [arm for name in (plan.candidate, plan.baseline) if (arm := arms.named(name)) is not None]
    leaving = [arm.engine for arm in gone]
    if promoted and candidate is not None:
        leaving = [control.engine, *(engine for engine in leaving if engine is not candidate.engine)]
        control.take_over(candidate)
        metrics.take_over(control.name, candidate.name, control.engine)
    for engine in leaving:
        engine.on_stats = None
    control.engine.on_stats = partial(metrics.on_stats, control.name)
    for arm in gone:
        metrics.forget_engine(arm.name)
    arms.remove(arm.name for arm in gone)
    return leaving


async def stop(engines: Sequence[EngineClientLike]) -> None:
    """Closes engines as soon as what they work on has ended."""
    await asyncio.sleep(GRACE_S)
    await asyncio.gather(*(engine.drain(MAX_DRAIN_S) for engine in engines))
    await asyncio.gather(*(engine.close() for engine in engines))


def told(plan: Plan, *, promoted: bool, control: str) -> str:
    """What is said of it."""
    if promoted:
        return (
            f"Arm {plan.candidate} is the {control} now; the engines of the old {control} and of {plan.baseline} stop"
        )
    return f"The engines of {plan.candidate} and {plan.baseline} stop; the {control} serves on"
