"""`outpace serve MODEL --optimize RECIPE`: the artifact first, then the server on it. No torch."""

from __future__ import annotations

import sys
from dataclasses import replace

from draft_models.packaged import packaged_head
from optimize.command import guarded, make
from optimize.options import OptimizeOptions
from optimize.recipe_file import load_recipe
from server.api.successor import Successor
from server.config import ServerConfig
from server.models.source import resolve

NICE = "19"


def optimized(config: ServerConfig, recipe: str) -> ServerConfig | int:
    """The same settings with the artifact in place of the model, or an exit status where there is none."""
    results: list[ServerConfig] = []

    def work() -> int:
        artifact = make(_options(config, recipe))
        results.append(with_artifact(config, recipe, str(artifact.directory)))
        return 0

    status = guarded("serve", work)
    return results[0] if results else status


def with_artifact(config: ServerConfig, recipe: str, directory: str) -> ServerConfig:
    """`config` for an artifact: the API goes on calling the model what it is called, and the head that comes with the
    original goes on drafting, as the gate has measured it."""
    engine, source = replace(config.engine, model=directory), resolve(config.engine.model)
    head = packaged_head(source.name) if source.kind == "embedded" else None
    if head is not None and engine.drafter in ("auto", "eagle3", "hybrid") and engine.draft_model is None:
        engine = replace(engine, draft_model=str(head))
    if load_recipe(recipe).kv_cache == "fp8" and engine.kv_cache_dtype == "auto":
        engine = replace(engine, kv_cache_dtype="fp8")
    name = config.served_model_name or source.name
    return replace(config, engine=engine, served_model_name=name)


def successor(config: ServerConfig, recipe: str) -> Successor:
    """The optimised model as what a running server goes over to, made by a process of low priority."""
    e = config.engine
    program = [sys.executable, "-P", "-m", "server", "optimize", e.model, "--recipe", recipe]
    command = [*program, "--device", e.device, "--dtype", e.dtype, "--nice", NICE]
    return Successor(command, lambda directory: with_artifact(config, recipe, directory).engine)


def _options(config: ServerConfig, recipe: str) -> OptimizeOptions:
    return OptimizeOptions(config.engine.model, recipe, device=config.engine.device, dtype=config.engine.dtype)
