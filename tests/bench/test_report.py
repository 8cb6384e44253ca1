from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bench import machine
from server.bench.compare import comparison, read_rows
from server.bench.report import BenchError, Report, Row, Spread, Table, number
from server.config import ConfigError


def test_a_table_is_aligned() -> None:
    table = Table("title", ["case", "tok/s"], [["short", "1,234"], ["a longer one", "9"]], num_names=1)
    assert str(table).split("\n") == [
        "title",
        "  case          tok/s",
        "  short         1,234",
        "  a longer one      9",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0123, "0.012"),
        (6.505, "6.505"),
        (14.04, "14.04"),
        (205.9, "205.9"),
        (42240.4, "42,240"),
        (-3.5, "-3.500"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_median_and_range() -> None:
    row = Spread.of([3.0, 1.0, 2.00004]).row("a/b", "ms", "note")
    assert row == Row("a/b", 2.0, "ms", (1.0, 3.0), "note")


def test_the_file_has_what_there_is_after_every_subject(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    report = Report({"name": "n", "command": "outpace bench"}, file)
    report.add([])
    assert json.loads(file.read_text())["rows"] == []
    report.add([Row("c1", 1.5, "ms", (1.0, 2.0), "why")])
    report.add([Row("c2", 1.5, "ms")])
    content = json.loads(file.read_text())
    assert [row["case"] for row in content["rows"]] == ["c1", "c2"]
    assert content["rows"][0] == {"case": "c1", "value": 1.5, "unit": "ms", "spread": [1.0, 2.0], "note": "why"}
    assert content["name"] == "n"
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"r\.json: cannot be written: No such file"):
        Report({}, tmp_path / "gone" / "r.json").add([])


def test_ours_beside_theirs(tmp_path: Path) -> None:
    file = tmp_path / "peer.json"
    rows = [
        {"case": "h100/a", "value": 6.5, "unit": "ms"},
        {"case": "h100/zero", "value": 0},
        {"case": "other", "value": 1},
    ]
    file.write_text(json.dumps({"rows": rows}))
    ours = [Row("h100/a", 5.2, "ms"), Row("h100/alone", 1.0, "ms"), Row("h100/zero", 1.0, "ms")]
    table = comparison(ours, read_rows(file))
    assert table.lines == [["h100/a", "ms", "5.200", "6.500", "0.80"], ["h100/zero", "ms", "1", "0", ""]]
    assert "1 of our cases" in table.title


@pytest.mark.parametrize(
    "content", ["", "[]", '{"rows": 3}', '{"rows": [{"case": "a"}]}', '{"rows": [{"case": "a", "value": "x"}]}']
)
def test_what_is_no_result_file(tmp_path: Path, content: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="no result file"):
        read_rows(file)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_names_of_gpus(name: str, short: str) -> None:
    assert machine.short_gpu_name(name) == short


def test_where_files_lay_is_private() -> None:
    assert machine.command(["/home/me/model", "--json", "/tmp/x y.json"]) == "outpace bench model --json 'x y.json'"


def test_the_commit_or_else_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    found = machine.head("n", [], "1.2.3", None)
    assert found["commit"] == "1.2.3"
    assert set(found) == {"name", "command", "commit", "date", "machine", "versions"}
    assert found["machine"]["cores"] >= 1 and found["versions"]["outpace"] == "1.2.3" and "torch" in found["versions"]
    (tmp_path / ".git").mkdir()
    answers = iter(["abc1234", " M server/x.py"])
    monkeypatch.setattr(machine, "_run", lambda command: next(answers))
    assert machine.commit() == "abc1234+dirty"


def test_a_gpu_is_described_as_far_as_its_tool_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_run", lambda c: "NVIDIA H100 80GB HBM3, 580.1, 81559 MiB, 700.00 W, 1980 MHz")
    assert machine.describe_gpu(0)["driver"] == "580.1"
    monkeypatch.setattr(machine, "_run", lambda c: None)
    assert machine.describe_gpu(0) == {"gpu": "unknown"}
