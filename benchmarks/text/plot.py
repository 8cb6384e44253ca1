"""The plot of a load sweep as an SVG file, written by hand: it needs no library where the benchmark runs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.common import Row

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 130, 44, 52
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
"""Okabe and Ito's, told apart by the colour-blind too."""
LEAST = 0.98
"""What adaptive drafting must reach of plain decoding."""
_CASE = re.compile(r"/sweep_tok_s/.*-(?P<way>adaptive|plain|k\d+)/b(?P<streams>\d+)$")

Curves = dict[str, dict[int, float]]


def curves(rows: Sequence[Row]) -> Curves:
    """Throughput of every way as a share of plain decoding's, by number of streams."""
    rates: Curves = {}
    for row in rows:
        match = _CASE.search(row.case)
        if match is not None:
            rates.setdefault(match["way"], {})[int(match["streams"])] = row.value
    plain = rates.pop("plain", {})
    return {way: {n: rate / plain[n] for n, rate in points.items() if n in plain} for way, points in rates.items()}


def plot_sweep(rows: Sequence[Row], title: str, file: Path) -> None:
    """Writes throughput against plain decoding by number of streams: the engine's own choice and every fixed length."""
    file.write_text(svg(curves(rows), title))


def svg(shares: Curves, title: str) -> str:
    streams = sorted({n for points in shares.values() for n in points})
    values = [share for points in shares.values() for share in points.values()]
    low, high = math.floor(min([*values, LEAST]) * 5) / 5, math.ceil(max([*values, 1.0]) * 5) / 5
    span = math.log2(max(streams[-1], 2) / streams[0]) or 1.0

    def x(n: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(n / streams[0]) / span

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (share - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, f"Throughput as a multiple of plain decoding: {title}", size=14),
    ]
    ticks = max(1, round((high - low) * 5 / 8))  # at most about eight lines
    for step in range(0, round((high - low) * 5) + 1, ticks):
        share = low + step / 5
        parts.append(_line(LEFT, y(share), WIDTH - RIGHT, y(share), "#dddddd"))
        parts.append(_text(LEFT - 8, y(share) + 4, f"{share:.1f}", anchor="end"))
    for n in streams:
        parts.append(_line(x(n), HEIGHT - BOTTOM, x(n), HEIGHT - BOTTOM + 5, "#333333"))
        parts.append(_text(x(n), HEIGHT - BOTTOM + 20, str(n), anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "streams", anchor="middle"))
    for share, name in ((1.0, "plain"), (LEAST, "")):
        dashes = "6 3" if name else "2 3"
        parts.append(_line(LEFT, y(share), WIDTH - RIGHT, y(share), "#333333", dashes))
    for i, (way, points) in enumerate([("plain", {}), *shares.items()]):
        colour = COLOURS[(i - 1) % len(COLOURS)] if i else "#333333"
        thick = 3.0 if way == "adaptive" else 1.5
        path = " ".join(f"{x(n):.1f},{y(points[n]):.1f}" for n in sorted(points))
        if path:
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
        parts += [f'<circle cx="{x(n):.1f}" cy="{y(s):.1f}" r="{thick}" fill="{colour}"/>' for n, s in points.items()]
        at = TOP + 10 + 20 * i
        parts.append(_line(WIDTH - RIGHT + 16, at, WIDTH - RIGHT + 40, at, colour, "" if i else "6 3", thick))
        parts.append(_text(WIDTH - RIGHT + 46, at + 4, way))
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "", width: float = 1.0) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
