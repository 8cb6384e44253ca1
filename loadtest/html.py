"""The report as one HTML page that asks nobody for anything: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from loadtest.asserts import Outcome
from loadtest.measure import METRICS, Seen, Summary
from loadtest.plots import acceptance, against_load, distributions, over_time

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--faint:#d5d9de;--paper:#fff;--card:#f6f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--faint:#3a4048;--paper:#15181c;--card:#1e2227}}
*{box-sizing:border-box}
body{margin:0 auto;padding:16px;max-width:1400px;background:var(--paper);color:var(--ink);
font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:0 0 4px}h2{font-size:1.1rem;margin:24px 0 8px}p{margin:4px 0}
.cards,.plots{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.plots{grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
.cards div,figure{background:var(--card);border-radius:8px;padding:10px;margin:0}
.cards b{display:block;font-size:1.25rem}figcaption{font-weight:600}
svg{width:100%;height:auto;display:block}svg text{font-size:13px;fill:var(--ink)}
.grid{stroke:var(--faint);stroke-width:1;fill:none}
.line{stroke:currentColor;stroke-width:2;fill:none}.bar{fill:currentColor}
.dots{stroke:currentColor;stroke-width:4;stroke-linecap:round;fill:none}
.c0{color:#2f6fdb}.c1{color:#d9822b}.c2{color:#2a9d5c}.c3{color:#b4459c}.c4{color:#8a6d3b}.c5{color:#6b7280}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 14px;margin:4px 0 0;padding:0;font-size:.85rem}
.legend li::before{content:"\\25CF  "}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:4px 10px;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap}
td:first-child,th:first-child{text-align:left}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px}dt{font-weight:600}dd{margin:0}
.bad{color:#c0392b;font-weight:600}.good{color:#2a9d5c;font-weight:600}
"""


@dataclass(frozen=True)
class Report:
    """What a page shows. `parts` are summaries by name, one without a name for a single target; `points` are a
    sweep's."""

    title: str
    facts: dict[str, str]
    parts: dict[str, Summary]
    percentiles: tuple[float, ...]
    runs: Sequence[Seen] = ()
    outcomes: Sequence[Outcome] = ()
    points: Sequence[tuple[float, Summary]] = ()
    unit: str = "requests/s"
    findings: Sequence[str] = ()
    tables: Sequence[Sequence[Sequence[str]]] = field(default_factory=tuple)


def write_page(path: Path, report: Report) -> None:
    """The report as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The whole document."""
    body = [
        f"<h1>{escape(report.title)}</h1><p>{escape(datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC'))}</p>",
        *(f"<p>{escape(line)}</p>" for line in report.findings),
        *_outcomes(report.outcomes),
        *(_figures(name, summary) for name, summary in report.parts.items()),
        _plots(report),
        *(_latencies(name, summary, report.percentiles) for name, summary in report.parts.items()),
        *(table(rows) for rows in report.tables),
        _warnings(report.parts.values()),
        "<h2>What was run</h2>" + _facts(report.facts),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text; the first one is the head's."""
    lines = []
    for number, row in enumerate(rows):
        cell = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _facts(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts.items()) + "</dl>"


def _outcomes(outcomes: Sequence[Outcome]) -> Iterable[str]:
    for outcome in outcomes:
        kind, word = ("good", "holds") if outcome.holds else ("bad", "fails")
        yield f'<p class="{kind}">{escape(str(outcome.assertion))} {word} ({outcome.value:.4g})</p>'


def _figures(name: str, summary: Summary) -> str:
    cards = {
        "requests/s": f"{summary.request_throughput:.2f}",
        "output tokens/s": f"{summary.output_throughput:.1f}",
        "tokens/s a user (median)": f"{summary.user_speed:.1f}",
        "completed": str(summary.completed),
        "failed": str(summary.failed),
        "median TTFT": f"{summary.samples['ttft'].percentile(50):.1f} ms",
        "median ITL": f"{summary.samples['itl'].percentile(50):.2f} ms",
    }
    if summary.request_goodput is not None:
        cards["goodput, requests/s"] = f"{summary.request_goodput:.2f}"
    if summary.speculation is not None:
        cards["acceptance"] = f"{summary.speculation.acceptance_rate:.3f}"
        cards["tokens a verify step"] = f"{summary.speculation.acceptance_length:.2f}"
    told = "".join(f"<div><b>{escape(value)}</b>{escape(label)}</div>" for label, value in cards.items())
    errors = "".join(f'<p class="bad">{count} x {escape(kind)}</p>' for kind, count in summary.errors.items())
    return (f"<h2>{escape(name)}</h2>" if name else "") + f'<div class="cards">{told}</div>{errors}'


def _plots(report: Report) -> str:
    drawn = [
        *against_load(report.points, report.unit),
        *distributions(report.parts),
        *(over_time(report.runs[0]) if report.runs else ()),
        *acceptance(report.parts),
    ]
    return f'<h2>Plots</h2><div class="plots">{"".join(drawn)}</div>'


def _latencies(name: str, summary: Summary, percentiles: Sequence[float]) -> str:
    rows = [["milliseconds", "mean", *(f"p{percent:g}" for percent in percentiles), "95 % interval of the last"]]
    for metric, label in METRICS.items():
        of = summary.samples[metric]
        if len(of):
            interval = summary.intervals[metric][f"p{percentiles[-1]:g}"]
            figures = [of.mean, *(of.percentile(percent) for percent in percentiles)]
            rows.append([label, *(f"{value:.2f}" for value in figures), f"{interval.low:.2f} to {interval.high:.2f}"])
    return f"<h2>Latency{': ' + escape(name) if name else ''}</h2>" + table(rows)


def _warnings(summaries: Iterable[Summary]) -> str:
    found = dict.fromkeys(warning for summary in summaries for warning in summary.warnings)
    told = "".join(f"<p>{escape(warning)}</p>" for warning in found)
    return f"<h2>To know before believing this</h2>{told}" if told else ""
