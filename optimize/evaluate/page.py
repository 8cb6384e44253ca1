"""The report as one HTML page: no file beside it, no request to anywhere, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from optimize.evaluate.plots import Bar, histogram, paired_bars, ranked_bars
from optimize.evaluate.run import Measured
from optimize.evaluate.tables import tables
from optimize.evaluate.verdict import Verdict
from server.bench.report import Spread

TEMPLATE = Path(__file__).resolve().parent / "templates" / "report.html.jinja"
MOST_PARTS = 16


def page(measured: Measured, verdict: Verdict, head: dict[str, Any], notes: Sequence[str]) -> str:
    """HTML; everything that comes from outside is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        base=measured.pair.base.name,
        candidate=measured.pair.candidate.name,
        verdict=verdict,
        tables=tables(measured, verdict),
        plots=plots(measured),
        head=head,
        notes=notes,
    )


def plots(measured: Measured) -> list[tuple[str, str]]:
    """(caption, SVG) of all that was measured."""
    m, found = measured, []
    if m.positions is not None and m.quality is not None:
        difference = histogram(
            m.positions.difference,
            "base − candidate, nats (tokens, log scale)",
            [(m.positions.difference.mean(), "mean")],
        )
        found.append(("Log-likelihood of the text's own tokens: what the candidate loses", difference))
        marks = [(m.quality.divergence_mean, "mean"), (m.quality.divergence_p99, "p99")]
        divergence = histogram(m.positions.divergence, "nats (tokens, log scale)", marks, decades=True)
        found.append(("KL divergence of the candidate's distribution from the base's", divergence))
    if m.speeds:
        steps = [(f"batch {t.batch}", _bar(t.base_ms), _bar(t.candidate_ms)) for t in m.speeds]
        rates = [(f"batch {t.batch}", _bar(t.base_tok_s), _bar(t.candidate_tok_s)) for t in m.speeds]
        found.append(("A decoding step, milliseconds (less is better)", paired_bars(steps, "median and range")))
        found.append(("Output tokens a second (more is better)", paired_bars(rates, "median and range")))
    if m.layers is not None:
        whole = [(cost.name.removeprefix("model."), cost.divergence) for cost in m.layers.layers]
        found.append(("Cost of each layer alone", ranked_bars(whole, "KL divergence, nats a token")))
        parts = [(cost.name.removeprefix("model."), cost.divergence) for cost in m.layers.parts[:MOST_PARTS]]
        if parts:
            found.append(("Parts of the layers that cost most", ranked_bars(parts, "KL divergence, nats a token")))
    return found


def _bar(spread: Spread) -> Bar:
    return Bar(spread.median, spread.low, spread.high)
