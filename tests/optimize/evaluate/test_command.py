"""The command as a whole on tiny models: what passes, what is refused and why, and what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optimize.evaluate.gate import check, gate_options
from optimize.evaluate.options import EvaluateOptions
from optimize.recipe import GateThresholds, Recipe
from server import cli
from tests.optimize.evaluate.conftest import changed, noise

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--tokens", "600", "--batch", "1,2", "--input", "8", "--output", "6", "--repeats", "2", "--device", "cpu")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('weights = "int4"\ngroup_size = 64\n[gate]\nmin_tokens = 500\n')
    return path


def evaluate(base: Path, candidate: Path, text: Path, recipe: Path, out: Path, *more: str) -> int:
    files = ("--text", str(text), "--recipe", str(recipe), "--out", str(out))
    return cli.main(["evaluate", str(base), str(candidate), *files, *QUICK, *more])


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.mark.timeout(300)
def test_equal_models_pass(
    tiny_llama_dir: Path, text_file: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = shutil.copytree(tiny_llama_dir, tmp_path / "same")
    assert evaluate(tiny_llama_dir, same, text_file, recipe, tmp_path / "out", "--layer-seconds", "5") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-2:] == [str(tmp_path / "out" / name) for name in ("report.json", "report.html")]
    found = report(tmp_path / "out")
    assert found["passed"] and found["reasons"] == []
    assert found["quality"]["perplexity_ratio"]["high"] == 1.0 and found["quality"]["top1_agreement"]["low"] == 1.0
    assert found["greedy"]["identical"] == 1.0 and found["greedy"]["first_divergence"] is None
    assert [tier["batch"] for tier in found["speed"]] == [1, 2]
    assert all(tier["base_ms"]["median"] > 0 and tier["candidate_tok_s"]["low"] > 0 for tier in found["speed"])
    assert found["sizes"]["base"] == found["sizes"]["candidate"]
    assert found["sizes"]["base"]["disk"] > found["sizes"]["base"]["kv_token"] == 2 * 2 * 2 * 16 * 4
    assert re.fullmatch(r"cpu\d+/ppl_ratio/same", found["rows"][0]["case"])
    assert str(tmp_path) not in json.dumps(found["command"]), "where files lay is private"


@pytest.mark.timeout(300)
def test_a_worse_candidate_is_refused_and_the_number_is_named(
    tiny_llama_dir: Path, text_file: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = changed(tiny_llama_dir, tmp_path / "<b>worse", noise("layers.1.mlp.down_proj", 1.0))
    assert evaluate(tiny_llama_dir, worse, text_file, recipe, tmp_path / "out", "--only", "quality,greedy,layers") == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the candidate is refused: " in error and "top-1 agreement 0." in error
    assert "model.layers.1.mlp.down_proj" in error and "group_size = 32" in error
    found = report(tmp_path / "out")
    assert not found["passed"]
    number = next(n for n in found["numbers"] if n["name"] == "top-1 agreement")
    assert number["bound"] < number["value"] < number["threshold"] == 0.95 and not number["passed"]
    assert found["quality"]["divergence_p99"] > found["quality"]["divergence_mean"] > 0
    assert found["greedy"]["identical"] < 1 and found["greedy"]["first_divergence"] >= 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Refused." in page and "&lt;b&gt;worse" in page and "<b>worse" not in page
    assert page.count("<svg") == 4
    assert not re.search(r"https?://|src=|href=|@import|url\(", page), "nothing is fetched"


def test_report_only_is_no_verdict(tiny_llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    worse = changed(tiny_llama_dir, tmp_path / "worse", noise("lm_head", 1.0))
    files = ["--text", str(text_file), "--out", str(tmp_path / "out"), "--only", "quality", "--report-only"]
    assert cli.main(["evaluate", str(tiny_llama_dir), str(worse), *QUICK, *files]) == 0
    assert not report(tmp_path / "out")["passed"]


@pytest.mark.timeout(300)
def test_a_drafter_is_measured_on_both(tiny_llama_dir: Path, text_file: Path, recipe: Path, tmp_path: Path) -> None:
    """The target itself as its drafter is always right, on a candidate it is not."""
    worse = changed(tiny_llama_dir, tmp_path / "worse", noise("lm_head", 0.5))
    more = ("--only", "drafter", "--drafter", str(tiny_llama_dir), "--max-draft-tokens", "3")
    assert evaluate(tiny_llama_dir, worse, text_file, recipe, tmp_path / "out", *more) == 3
    found = report(tmp_path / "out")["drafter"]
    assert found["base"]["acceptance_rate"] > 0.99 and found["base"]["emitted_per_step"] > 3
    assert found["candidate"]["acceptance_rate"] < 0.9
    assert found["ratio"] == pytest.approx(found["candidate"]["acceptance_rate"] / found["base"]["acceptance_rate"])
    number = report(tmp_path / "out")["numbers"][-1]
    assert number["name"] == "acceptance ratio" and not number["passed"]


def test_check_by_a_recipe(tiny_llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(
        "", "", text=text_file, tokens=600, device="cpu", parts=("quality",), out=tmp_path / "out"
    )
    options = replace(options, candidate_name="tiny-x")
    loose = Recipe("x", weights="int8", activations="int8", gate=GateThresholds(min_tokens=500))
    heard: list[tuple[str, float]] = []
    verdict = check(
        str(tiny_llama_dir), tiny_llama_dir, loose, options, show=lambda what, share: heard.append((what, share))
    )
    assert verdict.passed and heard[-1] == ("reading text", 1.0)
    found = report(tmp_path / "out")
    assert found["candidate"] == "tiny-x" and found["rows"][0]["case"].endswith("/ppl_ratio/tiny-x")
    assert found["recipe"]["name"] == "x" and found["gate"]["min_tokens"] == 500
    strict = replace(loose, gate=GateThresholds(max_perplexity_ratio=0.9, faster_at=(1,), min_tokens=500))
    verdict = check(str(tiny_llama_dir), tiny_llama_dir, strict, options)
    assert not verdict.passed
    assert verdict.reasons[:2] == [
        "perplexity ratio 1 (at worst 1) is over 0.9",
        "step time ratio at batch 1 was not measured",
    ]
    assert "use recipe int8-smoothquant" in verdict.reasons


def test_the_gate_measures_what_the_recipe_claims() -> None:
    assert gate_options("a", "b", GateThresholds(faster_at=(1, 8))).batch == (1, 8)
    claims = GateThresholds(faster_at=(1, 64), faster_at_cpu=())
    assert "speed" not in gate_options("a", "b", claims, "cpu").parts
    assert claims.on("cuda").faster_at == (1, 64) and claims.on("cpu").faster_at == ()
    assert GateThresholds(faster_at=(8,)).on("cpu").faster_at == (8,)
    assert "speed" not in gate_options("a", "b", GateThresholds(min_tokens=70_000)).parts
    assert gate_options("a", "b", GateThresholds(min_tokens=70_000)).tokens == 70_000


def test_layers_are_looked_at_where_quality_failed_only(tiny_llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    worse = changed(tiny_llama_dir, tmp_path / "worse", noise("layers.1.mlp.down_proj", 1.0))
    options = EvaluateOptions("", "", text=text_file, tokens=600, device="cpu", parts=("quality", "layers"))
    options = replace(options, layers_if_worse=True, layer_seconds=5.0)
    recipe = Recipe("x", gate=GateThresholds(min_tokens=500))
    for candidate, looked_at in ((worse, True), (tiny_llama_dir, False)):
        out = tmp_path / f"out-{looked_at}"
        check(str(tiny_llama_dir), candidate, recipe, replace(options, out=out))
        assert (report(out)["layers"] is not None) == looked_at


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--tokens", "600"], 2, "tokens: 600 is not valid; the gate asks for 50000"),
        (["--only", "speeed"], 2, "only: 'speeed' is not valid; use some of quality, greedy"),
        (["--only", "tasks"], 2, "tasks: missing"),
        (["--recipe", "int3"], 2, "recipe: 'int3' is not valid; use"),
        (["--dtype", "int3"], 2, "dtype: 'int3' is not valid"),
        (["--window", "4"], 2, "window: 4 is not valid; use 16 or more"),
        (["--candidate-weights", "x"], 2, "candidate_weights: 'x' is not valid; use one of auto, native"),
        (["--text", "nowhere.jsonl"], 2, "text: nowhere.jsonl: cannot be read: No such file"),
        (["--drafter", "nowhere"], 2, "drafter: 'nowhere' is not valid; use auto, none or"),
        (["--task-dir", "nowhere"], 2, "task_dir: 'nowhere' is not valid"),
    ],
)
def test_wrong_options(
    tiny_llama_dir: Path, arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(tiny_llama_dir), str(tiny_llama_dir), *arguments]) == status
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("max_perplexity = 1", "gate.max_perplexity: there is no such field; valid fields are max_perplexity_ratio"),
        ("min_top1_agreement = 1.5", "gate.min_top1_agreement: 1.5 is not valid; use 0 to 1"),
        ("max_perplexity_ratio = 'a'", "gate.max_perplexity_ratio: 'a' is not valid; use a number"),
        ("faster_at = [1, 0]", "gate.faster_at: 0 is not valid; use 1 to 65536"),
        ("min_acceptance_ratio = -1", "gate.min_acceptance_ratio: -1.0 is not valid; use 0 to 1000"),
        ("confidence = 1", "gate.confidence: 1.0 is not valid; use 0.5 or more and less than 1"),
    ],
)
def test_wrong_recipes(
    tiny_llama_dir: Path, tmp_path: Path, gate: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[gate]\n{gate}\n")
    assert cli.main(["evaluate", str(tiny_llama_dir), str(tiny_llama_dir), "--recipe", str(path)]) == 2
    assert f"mine.toml: {words}" in capsys.readouterr().err


def test_models_that_read_text_differently(
    tiny_llama_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny_llama_dir, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(content))
    files = ["--text", str(text_file), "--report-only", "--tokens", "600", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", str(tiny_llama_dir), str(other), *files]) == 1
    assert "other has another tokenizer than" in capsys.readouterr().err
