"""What was measured as tables, for the terminal and the page."""

from __future__ import annotations

import math

from optimize.evaluate.run import Measured
from optimize.evaluate.verdict import Verdict
from server.bench.report import Table, number

_MIB = 2**20
MOST_LAYERS = 12


def tables(measured: Measured, verdict: Verdict) -> list[Table]:
    """Those that something was measured for, what decides first."""
    found = [decision(verdict), quality(measured), speed(measured), sizes(measured), drafter(measured)]
    found += [tasks(measured), layers(measured)]
    return [table for table in found if table is not None and table.lines]


def decision(verdict: Verdict) -> Table:
    """Every number that has a say."""
    lines = []
    for n in verdict.numbers:
        limit = ("<" if n.strict else "≤") if n.better == "lower" else ("≥" if not n.strict else ">")
        bound = "" if n.bound is None else digits(n.bound)
        passed = "yes" if n.passed else "no"
        lines.append([n.name, digits(n.value), bound, f"{limit} {digits(n.threshold)}", passed])
    return Table("Gate", ["number", "value", "at worst", "threshold", "passed"], lines, num_names=1)


def quality(measured: Measured) -> Table | None:
    """Both models on the same text, and on the same prompts."""
    q, g = measured.quality, measured.greedy
    lines: list[list[str]] = []
    if q is not None:
        lines += [
            ["perplexity", digits(q.base_perplexity), digits(q.candidate_perplexity)],
            ["perplexity ratio", "1", digits(q.perplexity_ratio.mean)],
            ["KL divergence, mean, nats", "", digits(q.divergence_mean)],
            ["KL divergence, 99th percentile, nats", "", digits(q.divergence_p99)],
            ["top-1 agreement", "", digits(q.top1_agreement.mean)],
        ]
    if g is not None:
        parted = "–" if g.first_divergence is None else f"{g.first_divergence:.1f}"
        lines += [
            [f"same greedy answers, of {g.num_prompts}", "", f"{g.identical:.0%}"],
            [f"others part at token, of {g.max_tokens}", "", parted],
        ]
    return Table("Quality", ["", "base", "candidate"], lines, num_names=1)


def speed(measured: Measured) -> Table | None:
    """Every batch, both models."""
    columns = ["batch", "base ms/step", "candidate ms/step", "ratio", "range", "base tok/s", "candidate tok/s"]
    lines = [
        [
            str(t.batch),
            number(t.base_ms.median),
            number(t.candidate_ms.median),
            f"{t.ratio.median:.3f}",
            f"{t.ratio.low:.3f} – {t.ratio.high:.3f}",
            number(t.base_tok_s.median),
            number(t.candidate_tok_s.median),
        ]
        for t in measured.speeds
    ]
    return Table("Speed (medians; ratio candidate by base)", columns, lines)


def sizes(measured: Measured) -> Table:
    """On disk and in memory."""
    mine, theirs = measured.sizes
    rows = [
        ("weights on disk, MiB", mine.disk / _MIB, theirs.disk / _MIB),
        ("weights in memory, MiB", mine.weights / _MIB, theirs.weights / _MIB),
        ("KV cache a token, KiB", mine.kv_token / 1024, theirs.kv_token / 1024),
    ]
    lines = [[name, f"{a:,.1f}", f"{b:,.1f}", f"{b / a:.3f}" if a else ""] for name, a, b in rows]
    return Table("Size", ["", "base", "candidate", "ratio"], lines, num_names=1)


def drafter(measured: Measured) -> Table | None:
    """How the drafter does on both."""
    d = measured.drafting
    if d is None:
        return None
    rows = [
        ("drafts accepted", d.base.acceptance_rate, d.candidate.acceptance_rate),
        ("tokens emitted a step", d.base.emitted_per_step, d.candidate.emitted_per_step),
    ]
    lines = [[name, f"{a:.3f}", f"{b:.3f}", f"{b / a:.3f}" if a else ""] for name, a, b in rows]
    title = f"Drafter {d.name}, {d.max_draft_tokens} drafts a step"
    return Table(title, ["", "base", "candidate", "ratio"], lines, num_names=1)


def tasks(measured: Measured) -> Table | None:
    """Scores of lm-eval's tasks."""
    lines = [
        [f"{task}, {metric}", f"{mine:.4f}", f"{theirs:.4f}", f"{theirs - mine:+.4f}"]
        for task, scores in measured.tasks.items()
        for metric, (mine, theirs) in scores.items()
    ]
    return Table("Tasks", ["", "base", "candidate", "difference"], lines, num_names=1)


def layers(measured: Measured) -> Table | None:
    """The layers that cost most."""
    if measured.layers is None:
        return None
    whole = sum(cost.divergence for cost in measured.layers.layers) or 1.0
    lines = [
        [cost.name, digits(cost.divergence), f"{cost.divergence / whole:.1%}"]
        for cost in measured.layers.worst[:MOST_LAYERS]
    ]
    return Table("Layers that cost most", ["layer", "KL, nats", "of all layers' sum"], lines, num_names=1)


def digits(value: float | None) -> str:
    """Four digits that mean something; small numbers with an exponent."""
    if value is None:
        return "not measured"
    if not math.isfinite(value):
        return "not finite"
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4f}"
