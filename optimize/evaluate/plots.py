"""Plots as SVG inside the report's page: colours are the page's variables, sizes are right for a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 38
_BINS = 48
_ROW = 17
_LABEL_CHARACTERS = 30


@dataclass(frozen=True, slots=True)
class Bar:
    """`low` and `high` are drawn as a whisker where they are given."""

    value: float
    low: float | None = None
    high: float | None = None


def histogram(
    values: NDArray[Any], label: str, marks: Sequence[tuple[float, str]] = (), *, decades: bool = False
) -> str:
    """Counts on a logarithmic axis. What lies beyond the outermost thousandths is in the outer bins.

    `decades`: the horizontal axis is logarithmic too; what is not positive lies in its first bin.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        return _empty(label)
    if decades:
        positive = finite[finite > 0]
        floor = max(1e-9, float(np.quantile(positive, 0.001))) if len(positive) else 1e-9
        finite = np.log10(np.maximum(finite, floor))
        marks = [(math.log10(max(at, floor)), text) for at, text in marks]
    low, high = (float(x) for x in np.quantile(finite, [0.0 if decades else 0.001, 0.999]))
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(np.clip(finite, low, high), bins=_BINS, range=(low, high))
    top = math.log10(max(10, int(counts.max()) * 1.3))
    parts = [_axis_x(low, high, label, decades), *_decades_y(top)]
    width = (WIDTH - LEFT - RIGHT) / _BINS
    for i, count in enumerate(counts.tolist()):
        if count:
            tall = max(1.0, (HEIGHT - TOP - BOTTOM) * math.log10(max(count, 1.3)) / top)
            at = LEFT + i * width
            parts.append(_rect(at, HEIGHT - BOTTOM - tall, width - 0.6, tall, "base", f"{count:,}"))
    for at, text in marks:
        x = LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, (at - low) / (high - low)))
        parts.append(f'<line class="mark" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        near_end = x > WIDTH * 0.7
        anchor, shift = ("end", -4) if near_end else ("start", 4)
        parts.append(_text(x + shift, TOP + 9, text, anchor))
    return _svg(HEIGHT, parts, label)


def paired_bars(groups: Sequence[tuple[str, Bar, Bar]], label: str) -> str:
    """Base and candidate side by side; each group has an axis of its own, its larger bar being full height."""
    if not groups:
        return _empty(label)
    parts: list[str] = []
    room = (WIDTH - 2 * RIGHT) / len(groups)
    wide = min(46.0, room * 0.36)
    tall = HEIGHT - TOP - BOTTOM - 14
    for i, (name, *pair) in enumerate(groups):
        middle = RIGHT + room * (i + 0.5)
        largest = max(bar.high if bar.high is not None else bar.value for bar in pair) or 1.0
        for side, bar in enumerate(pair):
            x = middle + (side - 1) * (wide + 3) + 1.5
            height = tall * bar.value / largest
            y = HEIGHT - BOTTOM - height
            parts.append(_rect(x, y, wide, height, ("base", "candidate")[side], f"{name}: {bar.value:.3g}"))
            if bar.low is not None and bar.high is not None:
                ends = [HEIGHT - BOTTOM - tall * end / largest for end in (bar.low, bar.high)]
                centre = x + wide / 2
                parts.append(
                    f'<line class="whisker" x1="{centre:.1f}" y1="{ends[0]:.1f}" x2="{centre:.1f}" y2="{ends[1]:.1f}"/>'
                )
            parts.append(
                _text(
                    x + wide / 2,
                    min(y, HEIGHT - BOTTOM - tall * (bar.high or 0) / largest) - 4,
                    _short(bar.value),
                    "middle",
                )
            )
        parts.append(_text(middle, HEIGHT - BOTTOM + 14, name, "middle"))
    parts.append(
        f'<line class="axis" x1="{RIGHT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>'
    )
    parts.append(_text(WIDTH / 2, HEIGHT - 6, label, "middle"))
    return _svg(HEIGHT, parts, label)


def ranked_bars(rows: Sequence[tuple[str, float]], label: str) -> str:
    """One bar a row, names on the left."""
    if not rows:
        return _empty(label)
    names = 168
    height = TOP + len(rows) * _ROW + 22
    largest = max(value for _, value in rows) or 1.0
    parts = []
    for i, (name, value) in enumerate(rows):
        y = TOP + i * _ROW
        shown = name if len(name) <= _LABEL_CHARACTERS else "…" + name[1 - _LABEL_CHARACTERS :]
        parts.append(_text(names - 6, y + 11, shown, "end"))
        room = WIDTH - names - 48
        long = max(0.5, room * value / largest)
        parts.append(_rect(names, y + 2, long, _ROW - 5, "candidate", f"{name}: {value:.4g}"))
        parts.append(_text(names + long + 4, y + 11, _short(value), "start"))
    parts.append(_text(names, height - 6, label, "start"))
    return _svg(height, parts, label)


def _axis_x(low: float, high: float, label: str, decades: bool) -> str:
    parts = [f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>']
    for at in _ticks(low, high):
        x = LEFT + (WIDTH - LEFT - RIGHT) * (at - low) / (high - low)
        parts.append(_text(x, HEIGHT - BOTTOM + 14, f"1e{at:g}" if decades else f"{at:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label, "middle"))
    return "".join(parts)


def _decades_y(top: float) -> list[str]:
    parts = []
    for power in range(math.floor(top) + 1):
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * power / top
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 5, y + 4, f"{10**power:,}", "end"))
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between the ends."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _empty(label: str) -> str:
    return _svg(40, [_text(WIDTH / 2, 24, "nothing was measured", "middle")], label)


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.4, width):.1f}" height="{max(0.0, height):.1f}"'
    return f'<rect class="{kind}" {place}><title>{escape(title)}</title></rect>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
