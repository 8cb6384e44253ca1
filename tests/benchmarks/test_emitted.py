"""The protocol of emitted tokens per verify step, on a tiny model."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import common, emitted
from benchmarks.emitted import Job, jobs
from benchmarks.engine import Prompter, build
from benchmarks.text import talk
from benchmarks.text.closed_loop import Answer
from benchmarks.text.conversations import load_conversations
from benchmarks.text.talk import Talk, Talker, rows_of

LOOPING, VARIED = [1, 2, 3] * 20, list(range(60))


def write_prompts(path: Path) -> Path:
    said = [("a0", "a", ["the one", "and the other"]), ("a1", "a", ["in the end"]), ("b0", "b", ["all in all"])]
    lines = [json.dumps({"id": name, "category": category, "turns": turns}) for name, category, turns in said]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and the result file's content."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    words = ["--model", model, "--prompts", prompts, "--device", "cpu", "--max-prompt", "200", "--name", "found"]
    script = str(Path(emitted.__file__))
    monkeypatch.setattr(sys, "argv", [script, *map(str, words), "--max-tokens", "30", *options])
    with pytest.raises(SystemExit) as leaving:
        emitted.main()
    file = tmp_path / "results" / "found.json"
    return int(leaving.value.code or 0), json.loads(file.read_text()) if file.exists() else {}


def test_every_drafter_rule_and_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = run(monkeypatch, tmp_path, tiny_llama_dir, "--drafters", "ngram,none")
    assert status == 0, capsys.readouterr().out
    values = {row["case"].partition("/")[2]: row["value"] for row in result["rows"]}
    for mode in ("greedy", "t08", "t08-ratio"):
        case = f"emitted_per_step/smollm2-ngram/{mode}"
        assert values[case] == pytest.approx((values[f"{case}/a"] + values[f"{case}/b"]) / 2, abs=1e-3)
        assert values[f"emitted_per_step/smollm2-none/{mode}"] == 1.0
    assert "emitted_per_step/smollm2-ngram/greedy-ratio" not in values
    tables = result["detail"]["tables"]
    table = next(table for case, table in tables.items() if case.endswith("smollm2-ngram/greedy"))["all"]
    assert (table["a"]["answers"], table["b"]["answers"]) == (3, 1)
    plain = next(table for case, table in tables.items() if case.endswith("smollm2-none/greedy"))["all"]
    for category in "ab":  # the same words, so as many tokens, in fewer steps
        assert table[category]["emitted"] == plain[category]["emitted"] == plain[category]["steps"]
        assert table[category]["emitted"] - table[category]["steps"] == sum(table[category]["accepted"])


def test_what_the_budget_does_not_suffice_for_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = run(monkeypatch, tmp_path, tiny_llama_dir, "--drafters", "ngram", "--budget", "0")
    assert (status, result) == (1, {})
    assert "not run: ngram coupled greedy: out of time" in capsys.readouterr().out


def test_an_answer_that_has_begun_is_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    """The clock moves on whenever it is looked at: time for one answer to begin."""
    ticks = itertools.count()
    monkeypatch.setattr(talk, "time", SimpleNamespace(time_ns=time.time_ns, monotonic=lambda: next(ticks)))
    model = str(tiny_llama_dir)
    core = build("ngram", model=model, device="cpu", adaptive=False, kv_cache_tokens=400, max_num_seqs=1)
    conversations = load_conversations(write_prompts(tmp_path / "prompts.jsonl"))
    said = Talker(Prompter(model), 30, 200).talk(core, conversations, "greedy", 1, deadline=1.5)
    assert (len(said.answers), said.wanted) == (1, 4)
    assert len(said.answers[0][1].tokens) == 30
    rows = rows_of("x", said, "k = 5")
    assert rows[0].note.startswith("CUT OFF: 3 of 4 answers not run; mean of 1 categories")


def test_a_drafter_that_can_not_run_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--drafters", "small-lm,none", "--rules", "coupled", "--modes", "greedy")
    for given, reason in (((), "draft_model: missing"), (("--small-lm", "/nowhere"), "/nowhere: there is no such")):
        status, result = run(monkeypatch, tmp_path, tiny_llama_dir, *options, *given)
        assert status == 1
        assert f"small-lm coupled: {reason}" in capsys.readouterr().out
        assert result["rows"][0]["value"] == 1.0


def test_answers_that_loop_are_left_out() -> None:
    said = Talk(["a", "b"], 3)
    said.answers += [("a", Answer([0, *LOOPING], [(5, 5)] * 10)), ("a", Answer([0, *VARIED], [(5, 0)] * 60))]
    said.answers += [("b", Answer([0, *LOOPING], [(5, 5)] * 10))]
    rows = {row.case: row for row in rows_of("x", said, "k = 5")}
    assert rows["x/a"].value == round(120 / 70, 3)
    assert rows["x/b"].value == 6.0
    assert rows["x"].value == round((120 / 70 + 6) / 2, 3)
    assert rows["x/no-loops"].value == 1.0
    assert rows["x/no-loops"].note == "mean of 1 categories, without 2 of 3 answers that loop"


def test_greedy_decoding_runs_under_one_rule() -> None:
    found = list(jobs(["x", "y"], ["greedy", "t08"], ["coupled", "ratio"]))
    assert found == [
        Job("x", "coupled", ("greedy", "t08")),
        Job("y", "coupled", ("greedy", "t08")),
        Job("x", "ratio", ("t08",)),
        Job("y", "ratio", ("t08",)),
    ]
    assert found[2].case("h100", "m", "t08") == "h100/emitted_per_step/m-x/t08-ratio"
    assert [job.modes for job in jobs(["x"], ["greedy"], ["ratio"])] == [("greedy",)]
    assert list(jobs(["x"], ["greedy"], ["coupled", "ratio"])) == [Job("x", "coupled", ("greedy",))]


def test_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    options = ("--speed", "--drafters", "ngram", "--passes", "2", "--fixed", "3")
    status, result = run(monkeypatch, tmp_path, tiny_llama_dir, *options)
    assert status == 0, capsys.readouterr().out
    values = {row["case"].partition("/")[2]: row["value"] for row in result["rows"]}
    speeds = {f"tok_s/smollm2-ngram/b1{way}" for way in ("", "/plain", "/k3")}
    assert set(values) == speeds | {"speedup/smollm2-ngram/b1", "speedup/smollm2-ngram/b1/k3"}
    notes = {row["case"].partition("/")[2]: row["note"] for row in result["rows"]}
    assert notes["tok_s/smollm2-ngram/b1/plain"].startswith("plain; 1.000 tokens a step of")
    assert result["detail"]["prompts"] == ["a0", "b0"]
