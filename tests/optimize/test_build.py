from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from optimize.artifact import ArtifactStore
from optimize.build import Builder
from optimize.errors import OptimizeError, RefusedError
from optimize.options import OptimizeOptions
from optimize.plan import plan_layers
from optimize.ptq.job import Job
from optimize.recipe import LayerFormat, LayerRule, Recipe
from optimize.stage_runner import ChildStages, RunStage
from server import cli
from server.config import ConfigError
from server.models.source import resolve

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "tie_word_embeddings": True}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"model.embed_tokens.weight": np.zeros((8, 64), np.float32)}
    for name, columns in (("self_attn.q_proj", 64), ("mlp.down_proj", 96)):
        tensors[f"model.layers.0.{name}.weight"] = np.zeros((4, columns), np.float32)
    save_file(tensors, directory / "model.safetensors")
    return directory


class Stages:
    """Stands for the child processes; `fail` names a stage that raises."""

    def __init__(self, *, passed: bool = True, fail: tuple[str, Exception] | None = None) -> None:
        self.ran: list[str] = []
        self.passed, self.fail = passed, fail

    def __call__(self, stage: str, job: Job, show: Any, say: Any) -> Any:
        self.ran.append(stage)
        show(stage, 1.0)
        if self.fail is not None and self.fail[0] == stage:
            (Path(job.content) / "half").write_bytes(b"x")
            raise self.fail[1]
        if stage == "gate":
            (Path(job.content) / "report.html").write_text("<p>")
            reasons = [] if self.passed else ["perplexity ratio 1.2 is over 1.03"]
            return {"passed": self.passed, "reasons": reasons, "advice": ["use 8 bits"], "numbers": {}}
        if stage == "quantize":
            (Path(job.content) / "model.safetensors").write_bytes(b"quantised")
            return {"formats": ["int8"]}
        return {"chosen": {}, "perplexity_ratio": 1.0}


def builder(model: Path, stages: RunStage, recipe: str = "int8-weight-only", **options: Any) -> Builder:
    store = ArtifactStore(model.parent / "artifacts")
    return Builder(
        OptimizeOptions(str(model), recipe, **options), lambda text: None, store=store, stages=stages,
        show=lambda what, fraction: None,
    )  # fmt: skip


def test_built_once_and_then_loaded(model: Path) -> None:
    stages = Stages()
    first = builder(model, stages).artifact()
    assert stages.ran == ["quantize", "check", "gate"]
    again = Stages()
    assert builder(model, again).artifact().directory == first.directory and again.ran == []


@pytest.mark.parametrize(("recipe", "before"), [("int4-awq", ["texts"]), ("auto", ["texts", "choose"]), ("fp8", [])])
def test_the_stages_of_a_recipe(model: Path, recipe: str, before: list[str]) -> None:
    stages = Stages()
    builder(model, stages, recipe).artifact()
    assert stages.ran == [*before, "quantize", "check", "gate"]


def test_it_goes_on_behind_the_last_finished_stage(model: Path) -> None:
    with pytest.raises(OptimizeError, match="out of memory"):
        builder(model, Stages(fail=("check", OptimizeError("out of memory")))).artifact()
    stages = Stages()
    builder(model, stages).artifact()
    assert stages.ran == ["check", "gate"]


def test_a_full_disk_leaves_nothing_half_written(model: Path) -> None:
    full = Stages(fail=("quantize", OSError(errno.ENOSPC, "No space left on device")))
    made = builder(model, full)
    with pytest.raises(OSError, match="No space left"):
        made.artifact()
    assert made.store.artifacts() == []
    assert list(made.store.root.rglob("half")) == []
    assert builder(model, Stages()).artifact().directory.is_dir()


def test_what_the_gate_refuses_is_no_artifact_and_stays_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = builder(model, Stages(), "fp8", out=out).artifact()
    refused = builder(model, Stages(passed=False), out=out)
    with pytest.raises(RefusedError, match=r"perplexity ratio 1\.2 is over"):
        refused.artifact()
    assert refused.store.artifacts() == [kept.directory]
    assert json.loads((out / "artifact.json").read_text()) == kept.manifest
    again = Stages()
    with pytest.raises(RefusedError):
        builder(model, again).artifact()
    assert again.ran == []
    builder(model, again, rebuild=True).artifact()
    assert again.ran == ["quantize", "check", "gate"]


def test_what_was_not_gated_meets_the_gate_before_it_is_used(model: Path) -> None:
    assert builder(model, Stages(), skip_gate=True).artifact().manifest["gate"] is None
    stages = Stages(passed=False)
    with pytest.raises(RefusedError):
        builder(model, stages).artifact()
    assert stages.ran == ["gate"]
    assert builder(model, Stages()).artifact().manifest["gate"]["passed"]


def test_starts_at_the_same_time_share_one_build(model: Path) -> None:
    """All wait for whoever came first, and load what it made."""
    stages, inside = Stages(), threading.Event()

    def slow(stage: str, job: Job, show: Any, say: Any) -> Any:
        inside.wait(10)
        return stages(stage, job, show, say)

    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(builder(model, slow).artifact) for _ in range(3)]
        inside.set()
        found = {future.result(30).directory for future in made}
    assert len(found) == 1 and stages.ran == ["quantize", "check", "gate"]


def test_starts_at_the_same_time_share_one_gate(model: Path) -> None:
    builder(model, Stages(), skip_gate=True).artifact()
    stages = Stages()
    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(builder(model, stages).artifact) for _ in range(3)]
        assert all(future.result(30).manifest["gate"]["passed"] for future in made)
    assert stages.ran == ["gate"]
    assert builder(model, Stages()).store.leftovers() == []


def test_what_is_refused_says_the_number_the_advice_and_where_the_report_is(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(model.parent / "cache"))
    monkeypatch.setattr("optimize.build.require_libraries", lambda: None)
    stages = Stages(passed=False)
    monkeypatch.setattr("optimize.build.ChildStages", lambda log, nice: stages)
    arguments = ["optimize", str(model), "--recipe", "fp8"]
    assert cli.main(arguments) == 3
    printed = capsys.readouterr()
    *_, advice, reason = printed.err.splitlines()
    assert printed.out == "" and advice == "to try: use 8 bits"
    assert reason.startswith("outpace optimize: the quantised model is refused: perplexity ratio 1.2 is over 1.03; ")
    report = Path(reason.partition("report: ")[2].partition(";")[0])
    assert report.name == "report.html" and report.is_file()
    stages.passed = True
    assert cli.main([*arguments, "--rebuild"]) == 0
    printed = capsys.readouterr()
    assert (Path(printed.out.strip()) / "report.html").is_file()
    assert f"report: {printed.out.strip()}/report.html" in printed.err


def test_a_damaged_artifact_is_built_anew(model: Path) -> None:
    directory = builder(model, Stages()).artifact().directory
    (directory / "model.safetensors").write_bytes(b"quant")
    stages = Stages()
    builder(model, stages).artifact()
    assert "quantize" in stages.ran and (directory / "model.safetensors").read_bytes() == b"quantised"


def test_other_weights_or_another_recipe_are_another_artifact(model: Path, tmp_path: Path) -> None:
    first = builder(model, Stages()).artifact().directory
    mine = tmp_path / "mine.toml"
    mine.write_text("[gate]\nmax_perplexity_ratio = 1.5\n")
    assert builder(model, Stages(), str(mine)).artifact().directory != first
    save_file({"model.layers.0.self_attn.q_proj.weight": np.ones((4, 64), np.float32),
               "model.embed_tokens.weight": np.zeros((8, 64), np.float32)}, model / "model.safetensors")  # fmt: skip
    assert builder(model, Stages()).artifact().directory != first


def test_other_thresholds_judge_the_same_weights_again(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("[gate]\nmax_perplexity_ratio = 1.1\n")
    with pytest.raises(RefusedError):
        builder(model, Stages(passed=False), str(mine)).artifact()
    mine.write_text("[gate]\nmax_perplexity_ratio = 1.5\n")
    looser = Stages()
    first = builder(model, looser, str(mine)).artifact()
    assert looser.ran == ["gate"]
    mine.write_text("[gate]\nmax_perplexity_ratio = 1.01\n")
    stricter = Stages(passed=False)
    with pytest.raises(RefusedError):
        builder(model, stricter, str(mine)).artifact()
    assert stricter.ran == ["gate"]
    assert json.loads((first.directory / "artifact.json").read_text()) == first.manifest, "what passed then stays"


def test_out_is_not_put_over_other_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        builder(model, Stages(), out=tmp_path).artifact()


def test_calibration_text_is_checked_before_anything_runs(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "good"}\n\n{"text": "cut\n')
    recipe = tmp_path / "mine.toml"
    recipe.write_text('method = "awq"\nweights = "int4"\ngroup_size = 32\n[calibration]\nsource = "both"\n')
    with pytest.raises(ConfigError, match="calibration: missing"):
        builder(model, Stages(), str(recipe))
    with pytest.raises(OptimizeError, match=r"text\.jsonl, line 3: is not JSON"):
        builder(model, Stages(), str(recipe), calibration=text)
    with pytest.raises(ConfigError, match="needs no text"):
        builder(model, Stages(), calibration=text)


def test_group_sizes_that_do_not_divide_become_smaller_and_it_is_said(model: Path) -> None:
    plan = plan_layers(Recipe("x", weights="int4", group_size=64), resolve(str(model)))
    assert plan.layers["model.layers.0.mlp.down_proj"] == LayerFormat("int4", group_size=32)
    assert plan.layers["model.layers.0.self_attn.q_proj"].group_size == 64
    assert plan.notes == ("group size 32 in place of 64 where there are 96 columns",)
    assert plan.kept == ("lm_head",)


def test_a_rule_that_matches_nothing_is_an_error(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"pattern: '\*\.fc1' matches no linear layer"):
        plan_layers(Recipe("x", layers=(LayerRule("*.fc1", keep=True),)), resolve(str(model)))


def test_other_architectures_are_refused(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(OptimizeError, match="GPT2LMHeadModel cannot be quantised"):
        builder(model, Stages()).artifact()


def test_a_child_tells_why_it_failed(model: Path, tmp_path: Path) -> None:
    job = Job(str(tmp_path / "nowhere"), {"name": "x"}, str(tmp_path), str(tmp_path))
    with pytest.raises(OptimizeError, match=r"texts: .*nowhere: there is no such file"):
        ChildStages(tmp_path / "log")("texts", job, lambda what, fraction: None, lambda text: None)
