"""The load sweep: its plan, its ratios, its end."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import common, load_sweep
from benchmarks.h100 import PARTS
from benchmarks.load_sweep import CPU, GPU, Sweep, best_fixed, num_prompts, plan, rows_of
from benchmarks.text.conversations import load_conversations
from tests.benchmarks.test_emitted import write_prompts


@pytest.mark.parametrize("defaults", [CPU, GPU])
def test_the_plan_fits(defaults: load_sweep.Defaults) -> None:
    points = [int(n) for n in defaults.streams.split(",")]
    text, seconds = plan(points, 6 if defaults is GPU else 4, defaults.rounds, defaults)
    assert seconds < (800 if defaults is GPU else 1300)
    assert len(text.splitlines()) == 1 + len(points)
    assert all(num_prompts(n, defaults) >= defaults.per_stream * n for n in points)


def test_a_part_of_the_sweep_fits_a_lease_of_ten_minutes() -> None:
    for name in ("sweep", "sweep-many"):
        words = [word for word in PARTS[name].command[1:] if word not in (*WORDS, *WORDS.values())]
        options = load_sweep.options().parse_args(words)
        points = [int(n) for n in options.streams.split(",")]
        assert plan(points, 6, GPU.rounds, GPU)[1] < options.budget - 100 < 500
        assert GPU.rounds >= 7


WORDS = {"--model": "MODEL", "--prompts": "PROMPTS", "--draft-model": "HEAD"}


def test_cells_of_many_streams_are_longer() -> None:
    d = replace(CPU, cell_s=10.0, many_s=100.0, per_stream=1, tok_s={8: 100.0, 16: 100.0})
    assert num_prompts(16, d) > 9 * num_prompts(8, d)


def test_every_way_is_first_and_goes_before_and_after_every_other() -> None:
    sweep = sweep_of({(1, way): [] for way in ("plain", "adaptive", "k1", "k2", "k3", "k5")})
    orders = [sweep.order(number) for number in range(1, 8)]
    assert all(sorted(order) == sorted(sweep.ways) for order in orders)
    assert len({order[0] for order in orders}) >= 3
    before = sum(order.index("adaptive") < order.index("k3") for order in orders)
    assert 2 <= before <= 5, "in every round the same way round would favour one of them"


def test_a_cell_takes_the_time_it_should() -> None:
    d = replace(CPU, cell_s=10.0, max_tokens=50, max_prompt=250, tok_s={1: 25.0}, prompt_tok_s=100.0)
    assert num_prompts(1, d) == round(10 / (2 + 1))


def sweep_of(rates: dict[tuple[int, str], list[float]]) -> Sweep:
    sweep: Sweep = object.__new__(Sweep)
    sweep.ways = list(dict.fromkeys(way for _, way in rates))
    sweep.rates = rates
    return sweep


def test_ratios_are_of_medians_over_rounds_and_have_a_verdict() -> None:
    rates = {"plain": [10.0, 20.0, 10.0], "adaptive": [11.0, 22.0, 12.0], "k2": [20.0, 11.0, 12.0]}
    sweep = sweep_of({(4, way): values for way, values in rates.items()})
    rows = {row.case: row for row in rows_of(sweep, [4, 8], "cpu2", "m-x")}
    assert rows["cpu2/adaptive_vs_plain/m-x/b4"].value == 1.2  # of medians, not the median of 1.1, 1.1, 1.2
    best = rows["cpu2/adaptive_vs_best_fixed/m-x/b4"]
    assert best.value == 1.0 and best.note == "12 to 12 tok/s (k2); 3 rounds; spread: 95 % interval"
    assert best.spread == (0.55, 2.0) and best.verdict == "not shown"
    assert rows["cpu2/adaptive_vs_plain/m-x/b4"].verdict == "met"
    assert rows["cpu2/sweep_tok_s/m-x-adaptive/b4"].value == 12.0
    assert not any("b8" in case for case in rows)


def test_plain_may_be_the_best_fixed_length() -> None:
    assert best_fixed({"plain": [3.0], "adaptive": [9.0], "k2": [2.0]}) == "plain"


def test_a_sweep_of_a_tiny_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(load_sweep, "RESULTS", tmp_path)
    small = replace(CPU, cell_s=0.01, max_tokens=8, max_prompt=200, rounds=2, tok_s={1: 1e3, 2: 1e3}, prompt_tok_s=1e4)
    monkeypatch.setattr(load_sweep, "CPU", small)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    assert len(load_conversations(prompts)) == 3
    words = ["--model", tiny_llama_dir, "--prompts", prompts, "--device", "cpu", "--drafter", "ngram", "--name", "s"]
    options = [str(Path(load_sweep.__file__)), *map(str, words), "--streams", "1,2", "--fixed", "3"]
    for plain in ("same", "own"):
        monkeypatch.setattr(sys, "argv", [*options, "--plain", plain])
        with pytest.raises(SystemExit) as leaving:
            load_sweep.main()
        out = capsys.readouterr().out
        assert leaving.value.code == 0, out
        assert "2 points x 3 ways x 2 rounds" in out
    result = json.loads((tmp_path / "s.json").read_text())
    cases = {row["case"].partition("/")[2] for row in result["rows"]}
    for n in (1, 2):
        assert {f"adaptive_vs_plain/smollm2-ngram/b{n}", f"adaptive_vs_best_fixed/smollm2-ngram/b{n}"} <= cases
    assert (tmp_path / "s.svg").read_text().startswith("<svg")
    monkeypatch.setattr(sys, "argv", [*options, "--budget", "0"])
    with pytest.raises(SystemExit) as leaving:
        load_sweep.main()
    assert leaving.value.code == 1
    assert "not run: round 0 of 2 from 1 streams on" in capsys.readouterr().out
