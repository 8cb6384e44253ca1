"""What --optimize-in-background makes of a server: a canary, a swap that is said, or what was decided before."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimize import canary, room
from optimize.artifact import ArtifactStore
from optimize.canary import CANARY, Background, in_background
from optimize.room import no_room
from server import cli
from server.config import ArmConfig, ConfigError, EngineConfig, ServerConfig
from server.routing.plan import DEFAULT_STAGES, plan_of
from server.routing.verdict import allow_another, read_verdict, write_verdict

RECIPE = "int8-weight-only"


@pytest.fixture
def config(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(canary, "no_room", lambda engine: None)
    return ServerConfig(engine=EngineConfig(model=str(tiny_llama_dir)))


def made(config: ServerConfig, *, swap: bool = False) -> tuple[Background, str]:
    said: list[str] = []
    found = in_background(config, RECIPE, swap=swap, say=said.append)
    (line,) = said
    return found, line


def artifact_of(config: ServerConfig) -> Path:
    path = canary.artifact_path(config, RECIPE)
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_a_canary_beside_a_baseline_with_a_third_of_the_device_each(config: ServerConfig) -> None:
    found, line = made(config)
    control, candidate, baseline = found.config.all_arms
    assert (candidate.name, candidate.recipe, baseline.recipe) == (CANARY, RECIPE, None)
    assert control.engine == candidate.engine == baseline.engine and control.engine.device_share == 1 / 3
    assert found.config.experiment is not None and found.successor is None and found.optimizer is not None
    plan = plan_of(found.config.experiment)
    assert plan.retire and plan.stages == DEFAULT_STAGES and plan.goal == "no_worse"
    assert [stage.share for stage in plan.stages] == [1, 5, 25, 50, 100]
    assert plan.name == artifact_of(config).name and plan.name in line


def test_other_weights_are_another_experiment(config: ServerConfig, tmp_path: Path) -> None:
    assert canary.artifact_path(config, "fp8") != canary.artifact_path(config, RECIPE)


def test_the_file_may_say_how_the_experiment_goes(config: ServerConfig) -> None:
    stages = [{"share": 30}, {"share": 100}]
    own = ServerConfig(
        engine=EngineConfig(model=config.engine.model, kv_memory_share=0.2),
        experiment={"goal": "improve", "stages": stages},
    )
    found = made(own)[0].config
    assert found.experiment is not None and plan_of(found.experiment).goal == "improve"
    assert found.engine.device_share is None, "the settings divide the memory already"


def test_weights_of_arms_are_refused(config: ServerConfig) -> None:
    with pytest.raises(ConfigError, match=r"arms: 'a' has a weight; the canary's stages"):
        made(ServerConfig(engine=config.engine, arms=(ArmConfig("a", config.engine, 5),)))


def test_what_was_rolled_back_is_not_tried_again_until_it_is_asked_for(
    config: ServerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = artifact_of(config)
    write_verdict(artifact, status="rolled_back", experiment="x", reason="tpot is worse")
    found, line = made(config)
    assert found.config == config and found.successor is None
    assert "tpot is worse" in line and f"`outpace artifacts retry {artifact.name}`" in line
    (artifact / "artifact.json").write_text("{}")
    assert cli.main(["artifacts", "retry", artifact.name]) == 0
    assert "rolled back before; attempt 2" in capsys.readouterr().out
    again = made(config)[0].config
    assert again.experiment is not None and again.experiment["name"] == f"{artifact.name}-2"
    assert cli.main(["artifacts", "retry", "no-such"]) == 1


def test_what_was_promoted_is_served_at_once(config: ServerConfig) -> None:
    artifact = artifact_of(config)
    write_verdict(artifact, status="promoted", experiment="x", reason="tokens_per_s: +0.5")
    found, line = made(config)
    assert found.config.engine.model == str(artifact) and found.config.arms == () and "served at once" in line
    assert found.config.served_model_name == Path(config.engine.model).name
    allow_another(artifact)
    assert read_verdict(artifact).attempt == 2


def test_a_swap_is_said(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found, line = made(config, swap=True)
    assert found.successor is not None and found.config == config and "No canary (--swap-when-built)" in line
    monkeypatch.setattr(canary, "no_room", lambda engine: "the weights take too much")
    found, line = made(config)
    assert found.successor is not None and "No canary (the weights take too much)" in line
    with pytest.raises(ConfigError, match="api_workers: 2 is not valid where the model is swapped"):
        made(ServerConfig(engine=config.engine, api_workers=2))


def test_a_fifth_of_the_memory_is_the_limit(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(model=str(tiny_llama_dir), device="cpu")
    weights = room.weight_bytes(engine, on_gpu=False)
    assert weights == 2 * room.weight_bytes(engine, on_gpu=True)
    monkeypatch.setattr(room, "_system_bytes", lambda: 5 * weights)
    assert no_room(engine) is None
    monkeypatch.setattr(room, "_system_bytes", lambda: 5 * weights - 1)
    assert "more than a fifth" in str(no_room(engine))
    monkeypatch.setattr(room, "_gpu_bytes", lambda device: None)
    assert "not known" in str(no_room(EngineConfig(model=str(tiny_llama_dir), device="cuda")))


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["serve", "--swap-when-built"]) == 2
    assert cli.main(["serve", "--optimize-in-background"]) == 2
    file = tmp_path / "outpace.toml"
    file.write_text('[[arms]]\nname = "a"\n[experiment]\ncandidate = "a"\n')
    assert cli.main(["serve", "--config", str(file), "--optimize", "fp8", "--optimize-in-background"]) == 2
    words = capsys.readouterr().err
    for field in ("swap_when_built: ", "optimize: missing", "experiment.candidate: not valid"):
        assert field in words


def test_a_verdict_is_no_part_of_what_was_written(tmp_path: Path) -> None:
    from optimize.artifact import described

    (tmp_path / "model.safetensors").write_bytes(b"x")
    write_verdict(tmp_path, status="promoted", experiment="x", reason="")
    assert set(described(tmp_path, ArtifactStore(tmp_path).file_hash)) == {"model.safetensors"}
