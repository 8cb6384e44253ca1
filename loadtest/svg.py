"""Plots as SVG text: readable at phone width, in light and dark, without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 22, 12, 62
_COLOURS = 6
"""Classes c0 … c5 of the page's style sheet."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one name. `kind`: `line`, `dots` (not joined), `both` or `bars`."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "line"


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis says. A logarithmic one shows positive values only."""

    label: str
    logarithmic: bool = False
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to 0 … 1, with the values that get a mark."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def scale_of(values: Sequence[float], axis: Axis) -> Scale:
    """A scale that shows all values; without any it is 0 to 1 (logarithmic: 1 to 10)."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not axis.logarithmic)]
    if axis.logarithmic:
        return _logarithmic(*((min(known), max(known)) if known else (1.0, 10.0)))
    low = axis.least if axis.least is not None else min(known, default=0.0)
    high = axis.most if axis.most is not None else max(known, default=1.0)
    if not high > low:
        high = low + (abs(low) or 1.0)
    step = _step((high - low) / 5)
    first = low if axis.least is not None else math.floor(low / step) * step
    last = high if axis.most is not None else math.ceil(high / step - 1e-9) * step
    return Scale(first, last, False, tuple(first + step * n for n in range(int((last - first) / step + 1e-9) + 1)))


def _logarithmic(least: float, most: float) -> Scale:
    """From a round number to a round number, with marks at 1, 2 and 5 or, over a long range, at powers of ten."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1
    round_ones = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    low = max(v for v in round_ones if v <= least * (1 + 1e-9))
    high = min(v for v in round_ones if v >= most * (1 - 1e-9) and v > low)
    ticks = [v for v in round_ones if low <= v <= high]
    if len(ticks) > 6:
        powers = [10.0**power for power in range(first, last + 1) if low <= 10.0**power <= high]
        ticks = powers[:: max(1, math.ceil(len(powers) / 6))]
    return Scale(low, high, True, tuple(ticks))


def _step(about: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(about))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= about * (1 - 1e-9))


def number(value: float) -> str:
    """As short as a mark can be."""
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def plot(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """A figure with its title, or nothing where no series has a point."""
    shown = [one for one in series if len(one.xs)]
    if not shown:
        return ""
    across = scale_of([v for one in shown for v in one.xs], x)
    up = scale_of([v for one in shown for v in one.ys], y)
    parts = [*_grid(across, up), *_labels(x, y)]
    for place, one in enumerate(shown):
        parts.append(_drawn(one, across, up, place))
    legend = _legend(shown) if len(shown) > 1 or shown[0].name else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>{legend}</figure>'
    )


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _grid(across: Scale, up: Scale) -> list[str]:
    parts = []
    for value in across.ticks:
        at = _x(across(value))
        parts.append(f'<path class="grid" d="M{at:.1f} {_y(0):.1f}V{_y(1):.1f}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_y(0) + 18:.1f}" text-anchor="middle">{number(value)}</text>')
    for value in up.ticks:
        at = _y(up(value))
        parts.append(f'<path class="grid" d="M{_x(0):.1f} {at:.1f}H{_x(1):.1f}"/>')
        parts.append(f'<text x="{_x(0) - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    return parts


def _labels(x: Axis, y: Axis) -> list[str]:
    middle = (_y(0) + _y(1)) / 2
    return [
        f'<text x="{(_x(0) + _x(1)) / 2:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{escape(x.label)}</text>',
        f'<text x="12" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 12 {middle:.1f})">'
        f"{escape(y.label)}</text>",
    ]


def _drawn(one: Series, across: Scale, up: Scale, place: int) -> str:
    points = [
        (_x(across(a)), _y(up(min(max(b, up.low), up.high))))
        for a, b in zip(one.xs, one.ys, strict=True)
        if math.isfinite(a) and math.isfinite(b)
        if (a > 0 or not across.logarithmic) and (b > 0 or not up.logarithmic)
    ]
    colour = f"c{place % _COLOURS}"
    if one.kind == "bars":
        width = 0.7 * (WIDTH - _LEFT - _RIGHT) / (across.high - across.low)  # bars stand at whole numbers
        bars = (f"M{a - width / 2:.1f} {_y(0):.1f}V{b:.1f}h{width:.1f}V{_y(0):.1f}z" for a, b in points)
        return f'<path class="bar {colour}" d="{"".join(bars)}"/>'
    drawn = ""
    if one.kind in ("line", "both") and points:
        drawn += f'<path class="line {colour}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in points)}"/>'
    if one.kind in ("dots", "both") or len(points) == 1:
        drawn += f'<path class="dots {colour}" d="{"".join(f"M{a:.1f} {b:.1f}h0" for a, b in points)}"/>'
    return drawn


def _legend(series: Sequence[Series]) -> str:
    names = (f'<li class="c{place % _COLOURS}">{escape(one.name)}</li>' for place, one in enumerate(series))
    return f'<ul class="legend">{"".join(names)}</ul>'
