from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draft_models.packaged import WEIGHTS
from optimize import serving
from optimize.serving import arms_optimizer, with_artifact
from server.config import ArmConfig, ConfigError, EngineConfig, ServerConfig
from server.models.source import ModelSource


@pytest.fixture(autouse=True)
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model need not be converted for its name."""

    def found(spec: str) -> ModelSource:
        return ModelSource(Path(spec), spec, {}, "embedded" if spec == "smollm2-135m" else "directory")

    monkeypatch.setattr(serving, "resolve", found)


def served(model: str, recipe: str = "fp8", **fields: Any) -> EngineConfig:
    config = ServerConfig(engine=EngineConfig(model=model))
    return with_artifact(replace(config, engine=replace(config.engine, **fields)), recipe, "artifact").engine


def test_the_head_that_comes_with_a_model_drafts_for_what_was_made_of_it() -> None:
    engine = served("smollm2-135m")
    assert engine.model == "artifact" and engine.draft_model is not None
    assert Path(engine.draft_model).parent == WEIGHTS and engine.drafter == "auto"


def test_a_named_drafter_and_other_models_are_left_alone() -> None:
    assert served("smollm2-135m", draft_model="mine", drafter="eagle3").draft_model == "mine"
    assert served("smollm2-135m", drafter="suffix").draft_model is None
    assert served("other").draft_model is None


def test_the_api_goes_on_calling_the_model_what_it_is_called() -> None:
    config = ServerConfig(engine=EngineConfig(model="smollm2-135m"))
    assert with_artifact(config, "fp8", "artifact").served_model_name == "smollm2-135m"
    named = replace(config, served_model_name="mine")
    assert with_artifact(named, "fp8", "artifact").served_model_name == "mine"


def test_a_float8_kv_cache_is_the_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('kv_cache = "fp8"\n')
    assert served("other", str(recipe)).kv_cache_dtype == "fp8"
    assert served("other").kv_cache_dtype == "auto"


def test_arms_that_say_nothing_else_are_optimised_as_the_control() -> None:
    original, other = EngineConfig(model="mine"), EngineConfig(model="other")
    arms = (
        ArmConfig("baseline", original),
        ArmConfig("plain", replace(original, drafter="none")),
        ArmConfig("original", original, recipe="none"),
        ArmConfig("int8", original, recipe="int8-weight-only"),
        ArmConfig("other", other),
    )
    served = with_artifact(ServerConfig(engine=original, arms=arms), "fp8", "artifact")
    assert [arm.engine.model for arm in served.arms] == ["artifact", "artifact", "mine", "mine", "other"]
    assert served.arms[0].engine == served.engine


def test_recipes_of_arms_are_checked_at_the_start() -> None:
    def config(recipe: str | None) -> ServerConfig:
        return ServerConfig(arms=(ArmConfig("new", EngineConfig(), recipe=recipe),))

    assert arms_optimizer(config(None)) is None and arms_optimizer(config("none")) is None
    found = arms_optimizer(config("fp8"))
    assert found is not None and "fp8" in found.command(EngineConfig(), "fp8")
    with pytest.raises(ConfigError, match=r"arms: new: .*no-such"):
        arms_optimizer(config("no-such"))
