"""What `outpace serve` serves of optimised models: as the control, behind it, or as arms. No torch."""

from __future__ import annotations

import sys
from dataclasses import replace

from draft_models.packaged import packaged_head
from optimize.command import guarded, make
from optimize.options import OptimizeOptions
from optimize.recipe_file import load_recipe
from server.api.builds import Optimizer
from server.api.successor import Successor
from server.config import NO_RECIPE, ConfigError, EngineConfig, ServerConfig
from server.models.source import resolve

NICE = "19"


def optimized(config: ServerConfig, recipe: str) -> ServerConfig | int:
    """The same settings with the artifact in place of the model, or an exit status where there is none."""
    results: list[ServerConfig] = []

    def work() -> int:
        artifact = make(artifact_options(config, recipe))
        results.append(with_artifact(config, recipe, str(artifact.directory)))
        return 0

    status = guarded("serve", work)
    return results[0] if results else status


def with_artifact(config: ServerConfig, recipe: str, directory: str) -> ServerConfig:
    """`config` for an artifact: the API calls the model what it is called. Arms that say neither another model
    nor a recipe are as the control here too."""
    model, engine = config.engine.model, engine_with_artifact(config.engine, recipe, directory)
    arms = tuple(
        replace(arm, engine=engine_with_artifact(arm.engine, recipe, directory))
        if arm.recipe is None and arm.engine.model == model
        else arm
        for arm in config.arms
    )
    name = config.served_model_name or resolve(model).name
    return replace(config, engine=engine, arms=arms, served_model_name=name)


def engine_with_artifact(config: EngineConfig, recipe: str, directory: str) -> EngineConfig:
    """`config` for an artifact. The head that comes with the original goes on drafting, as the gate measured."""
    engine, source = replace(config, model=directory), resolve(config.model)
    head = packaged_head(source.name) if source.kind == "embedded" else None
    if head is not None and engine.drafter in ("auto", "eagle3", "hybrid") and engine.draft_model is None:
        engine = replace(engine, draft_model=str(head))
    if load_recipe(recipe).kv_cache == "fp8" and engine.kv_cache_dtype == "auto":
        engine = replace(engine, kv_cache_dtype="fp8")
    return engine


def arms_optimizer(config: ServerConfig) -> Optimizer | None:
    """What builds the models of arms with a recipe; None: there are none. Raises ConfigError for a wrong recipe."""
    found = [arm for arm in config.arms if arm.recipe not in (None, NO_RECIPE)]
    for arm in found:
        try:
            load_recipe(str(arm.recipe))
        except ConfigError as error:
            raise ConfigError(f"arms: {arm.name}: {error}") from error
    return Optimizer(_command, engine_with_artifact) if found else None


def successor(config: ServerConfig, recipe: str) -> Successor:
    """The optimised model as what a running server goes over to, made by a process of low priority."""
    return Successor(
        _command(config.engine, recipe), lambda directory: engine_with_artifact(config.engine, recipe, directory)
    )


def _command(engine: EngineConfig, recipe: str) -> list[str]:
    program = [sys.executable, "-P", "-m", "server", "optimize", engine.model, "--recipe", recipe]
    return [*program, "--device", engine.device, "--dtype", engine.dtype, "--nice", NICE]


def artifact_options(config: ServerConfig, recipe: str) -> OptimizeOptions:
    """What `outpace optimize` is asked for."""
    return OptimizeOptions(config.engine.model, recipe, device=config.engine.device, dtype=config.engine.dtype)
