"""What a speculative step costs in plain steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import break_even, common
from benchmarks.h100 import filled


def test_arithmetic() -> None:
    assert break_even.break_even(6.505, 9.1456) == pytest.approx(1.41, abs=0.005)  # the peer's, at batch 1
    assert break_even.break_even(2.0, 2.0) == 1.0


def test_a_tiny_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    words = ["--model", tiny_llama_dir, "--device", "cpu", "--drafter", "ngram", "--label", "tiny", "--name", "found"]
    sizes = ["--batch", "1,3", "--input", "12", "--output", "30", "--repeats", "2"]
    script = str(Path(break_even.__file__))
    monkeypatch.setattr(sys, "argv", [script, *map(str, words), *sizes])
    with pytest.raises(SystemExit) as leaving:
        break_even.main()
    assert leaving.value.code == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["case"].partition("/")[2] for row in rows] == ["break_even/tiny/b1", "break_even/tiny/b3"]
    assert all(row["value"] > 0 and row["spread"][0] <= row["value"] <= row["spread"][1] for row in rows)
    monkeypatch.setattr(sys, "argv", [script, *map(str, words), *sizes, "--budget", "0"])
    with pytest.raises(SystemExit) as leaving:
        break_even.main()
    assert leaving.value.code == 1
    assert "not run: batch 1, out of time" in capsys.readouterr().out


def test_options_without_a_value_are_left_out() -> None:
    command = ("benchmarks/x.py", "--model", "MODEL", "--draft-model", "HEAD", "--k", "5")
    words = {"MODEL": "m", "HEAD": None}
    assert filled(command, words) == ["benchmarks/x.py", "--model", "m", "--k", "5"]
    assert filled(command, {**words, "HEAD": "h"})[3:5] == ["--draft-model", "h"]
