"""The report as a browser shows it."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.asserts import check, parse_assertion
from loadtest.html import Report, page, write_page
from loadtest.measure import measure
from loadtest.scrape import Speculation
from loadtest.settings import Load
from tests.browser import Opened, needs_chromium, opened
from tests.loadtest.virtual import asked, run

PERCENTILES = (50.0, 90.0, 99.0)
SPECULATION = Speculation(100.0, 400.0, 220.0, {1: 90.0, 2: 70.0, 3: 40.0, 4: 20.0})
PLOTS = {
    "Time to first token against load",
    "Time per output token against load",
    "End-to-end latency against load",
    "Throughput against load",
    "Throughput against user speed",
    "Latency of requests",
    "Between tokens",
    "Output tokens a second",
    "Open requests",
    "Time to first token over time",
    "Accepted draft tokens by position",
}
# A plot is drawn if something with a size lies inside its axes.
DRAWN = """Object.fromEntries([...document.querySelectorAll('figure')].map(figure => [
    figure.querySelector('figcaption').textContent,
    [...figure.querySelectorAll('.line, .dots, .bar')].every(mark => {
        const box = mark.getBBox();
        const right = box.x + box.width, low = box.y + box.height;
        return box.width + box.height > 1 && box.x >= 0 && right <= 420 && box.y >= 0 && low <= 280;
    }) && figure.querySelectorAll('.line, .dots, .bar').length > 0]))"""
SMALLEST_TEXT = (
    "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height || 99))"
)


@pytest.fixture(scope="module")
def report() -> Report:
    """A sweep of three loads, with speculation, an error and an assertion that fails."""
    rates = (5.0, 10.0, 20.0)
    runs = [run({"ttft_s": [0.1, 0.2, 0.3], "gap_s": 0.02 * r}, Load(rate=r, requests=40), asked(6)) for r in rates]
    summaries = [measure([replace(seen, speculation=SPECULATION)], (), PERCENTILES) for seen in runs]
    seen, summary = runs[-1], summaries[-1]
    summary.warnings.append("few-requests: <b>not bold</b>")
    outcomes = check([parse_assertion("p99_ttft_ms<1")], summary.values(PERCENTILES))
    return Report(
        "Load test of <script>alert(1)</script>",
        {"server": "http://127.0.0.1:8000", "a long fact": "word " * 60},
        {"": summary},
        PERCENTILES,
        [seen],
        outcomes,
        list(zip(rates, summaries, strict=True)),
        findings=["highest load: 20"],
        tables=[[["load", "done"], ["20", "40"]]],
    )


def test_a_page_asks_nobody_for_anything_and_escapes_what_it_shows(report: Report) -> None:
    text = page(report)
    assert "<script" not in text
    assert "<b>not bold" not in text
    assert not re.search(r"(?:src|href)=(?!\"data:,\")|url\(|@import", text)
    assert "nan" not in re.sub(r"<[^>]*>", "", text).lower().split()
    assert set(re.findall(r"<figcaption>(.*?)</figcaption>", text)) == PLOTS


def test_plots_without_data_are_left_out() -> None:
    seen = run({"ttft_s": 0.1, "gap_s": 0.01}, Load(rate=10.0, requests=3), asked(1))
    text = page(Report("t", {}, {"": measure([seen], (), PERCENTILES)}, PERCENTILES, [seen]))
    assert "Latency of requests" in text
    assert "Between tokens" not in text
    assert "against load" not in text


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_draws_every_plot_without_a_complaint(report: Report, width: int, tmp_path: Path) -> None:
    write_page(tmp_path / "deep" / "report.html", report)
    expressions = {
        "drawn": DRAWN,
        "width": "Math.max(document.documentElement.scrollWidth, window.innerWidth)",
        "text": SMALLEST_TEXT,
    }

    async def look() -> tuple[Opened, dict[str, Any]]:
        async with opened((tmp_path / "deep" / "report.html").as_uri(), width=width) as window:
            return window, {name: await window.page.evaluate(f"() => {of}") for name, of in expressions.items()}

    window, found = asyncio.run(look())
    assert (window.errors, window.strange) == ([], [])
    assert found["drawn"] == dict.fromkeys(PLOTS, True)
    assert found["width"] == width  # nothing makes the whole page wider than the window
    assert found["text"] >= 9  # CSS pixels
