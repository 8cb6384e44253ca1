"""`outpace serve --optimize RECIPE --optimize-in-background`: the artifact as a canary, or swapped in. No torch.

rolled back before ──► the original alone            promoted before ──► the artifact alone
--swap-when-built, or no room for three engines ──► swapped in between requests, compared with nothing
else ──► original (control) + artifact (canary) + original again (baseline), and an experiment decides
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from optimize.build import Builder
from optimize.room import DEVICE_SHARE, no_room
from optimize.serving import arms_optimizer, artifact_options, successor, with_artifact
from server.api.builds import Optimizer
from server.api.successor import Successor
from server.config import ArmConfig, ConfigError, ServerConfig, with_arms
from server.models.source import resolve
from server.routing.plan import plan_of
from server.routing.verdict import Verdict, read_verdict

CANARY = "canary"
GOAL = "no_worse"
"""The gate has shown what the artifact is good for; live it must show that nobody is worse off."""


@dataclass(frozen=True, slots=True)
class Background:
    """What to serve, and what brings the optimised model into it."""

    config: ServerConfig
    successor: Successor | None = None
    optimizer: Optimizer | None = None


def in_background(config: ServerConfig, recipe: str, *, swap: bool, say: Callable[[str], None]) -> Background:
    """By the rule above; `say` hears which of them it is. Raises ConfigError, ModelSourceError, OSError."""
    optimizer = arms_optimizer(config)
    why = "--swap-when-built" if swap else no_room(config.engine)
    if why is not None:
        return _swapped(config, recipe, why, say)
    artifact = artifact_path(config, recipe)
    verdict = read_verdict(artifact)
    if verdict.status == "promoted" and artifact.is_dir():
        say(f"{artifact.name} was promoted on {verdict.at} ({verdict.reason}): it is served at once")
        return Background(with_artifact(config, recipe, str(artifact)), None, optimizer)
    if verdict.status == "rolled_back":
        say(
            f"{artifact.name} was rolled back on {verdict.at} ({verdict.reason}): the original is served alone; "
            f"`outpace artifacts retry {artifact.name}` lets the next start try it again"
        )
        return Background(_without(config), None, optimizer)
    made = with_canary(config, recipe, experiment_name(artifact, verdict))
    say(
        f"The optimised model enters as arm {CANARY} when it is built, beside a baseline of equal weight; "
        f"experiment {experiment_name(artifact, verdict)} decides"
    )
    return Background(made, None, arms_optimizer(made))


def artifact_path(config: ServerConfig, recipe: str) -> Path:
    """Where the artifact is or will be. The weights are read for that once, to hash them."""
    made = Builder(artifact_options(config, recipe), lambda text: None)
    return made.store.path(made.key(resolve(config.engine.model)))


def experiment_name(artifact: Path, verdict: Verdict) -> str:
    """The artifact's, so that a restart finds the experiment: other weights or another recipe are another one."""
    return artifact.name if verdict.attempt == 1 else f"{artifact.name}-{verdict.attempt}"


def with_canary(config: ServerConfig, recipe: str, name: str) -> ServerConfig:
    """`config` with a canary and its experiment; a third of the device for each engine. Raises ConfigError."""
    settings = {"goal": GOAL, **(config.experiment or {}), "name": name, "candidate": CANARY, "retire": True}
    plan = plan_of(settings)
    weighted = [arm.name for arm in config.arms if arm.weight]
    if weighted:
        raise ConfigError(f"arms: {weighted[0]!r} has a weight; the canary's stages say who gets what")
    engine = config.engine
    if engine.device_share is None and engine.kv_cache_tokens is None and engine.kv_memory_share is None:
        engine = replace(engine, device_share=DEVICE_SHARE)
    arms = (*config.arms, ArmConfig(CANARY, engine, recipe=recipe), ArmConfig(plan.baseline, engine))
    return replace(config, engine=engine, arms=arms, experiment=settings)


def _without(config: ServerConfig) -> ServerConfig:
    """No canary: what the file says of its experiment, or of a shadow of it, has no meaning."""
    return with_arms(config, config.arms, experiment=None)


def _swapped(config: ServerConfig, recipe: str, why: str, say: Callable[[str], None]) -> Background:
    if config.api_workers > 1:
        raise ConfigError(f"api_workers: {config.api_workers} is not valid where the model is swapped ({why}); use 1")
    say(f"No canary ({why}): the optimised model takes the original's place when it is built, compared with nothing")
    return Background(_without(config), successor(config, recipe), arms_optimizer(config))
