"""The plot of a sweep."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from benchmarks.common import Row
from benchmarks.text.plot import curves, plot_sweep

RATES = {("plain", 1): 20.0, ("plain", 8): 100.0, ("adaptive", 1): 30.0, ("adaptive", 8): 99.0, ("k5", 1): 40.0}
ROWS = [Row(f"cpu2/sweep_tok_s/smollm2-eagle3-{way}/b{n}", rate, "tok/s") for (way, n), rate in RATES.items()]


def test_curves_are_shares_of_plain() -> None:
    others = [Row("cpu2/adaptive_vs_plain/smollm2-eagle3/b1", 1.5, "x")]
    assert curves([*ROWS, *others]) == {"adaptive": {1: 1.5, 8: 0.99}, "k5": {1: 2.0}}


def test_the_file_is_svg(tmp_path: Path) -> None:
    file = tmp_path / "sweep.svg"
    plot_sweep(ROWS, "a < b", file)
    root = ElementTree.fromstring(file.read_text())
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"adaptive", "k5", "plain", "1", "8"} <= set(texts)
    assert any("a < b" in text for text in texts if text)
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 2
    assert lines[0].attrib["points"].count(",") == 2


def test_one_point_is_enough(tmp_path: Path) -> None:
    plot_sweep(ROWS[:1] + ROWS[2:3], "one", tmp_path / "one.svg")
    ElementTree.fromstring((tmp_path / "one.svg").read_text())
