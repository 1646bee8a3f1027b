"""Draws charts as HTML and SVG text without a library: curves, histograms, stacked bars, and timelines. The functions are pure.

A chart fills the available width. Positions are percentages, so that text has the same size on wide and narrow screens.
`style.css` sets the colors and lines of all charts, and `hover.js` shows the values under the pointer.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

Points = list[tuple[float, float]]
INKS = 6  # colors of curves, --ink0 to --ink5 in the style
MOST = 1200  # maximum number of points that are drawn for a curve
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # allowed distances between ticks, times a power of ten
BARS = 40  # maximum number of bars in a histogram
WIDE = 100  # if the values' ratio is this large, the axis is logarithmic
Bins = dict[str, list[int]]  # numbers of kept and dropped documents, by value
UNITS = ((1e9, "G"), (1e6, "M"), (1e4, "k"))  # units of labels, each with the smallest value for which it is used


class Curve(NamedTuple):
    """Holds one curve of a chart. `mark`: whether to draw dots, for a curve that has values only at some steps."""

    name: str
    points: Points
    mark: bool = False


def thin(points: Points, most: int = MOST) -> Points:
    """Reduces a curve to at most `most` points.

    In each section of the curve, keeps the lowest and the highest point, so that no spike is lost.
    """
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    out: Points = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        out += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return out


def ticks(low: float, high: float, count: int = 7, whole: bool = False) -> list[float]:
    """Chooses about `count` round numbers for the ticks of an axis. The first tick is at or below `low`, the last at or above
    `high`.

    `whole`: whether all ticks must be integers.
    """
    if not high > low:
        low, high = (min(0.0, 2 * low), max(0.0, 2 * low)) if low else (0.0, 1.0)
    step = _step((high - low) / count, whole)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _step(rough: float, whole: bool) -> float:
    rough = max(1.0, rough) if whole else rough
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(unit * m for m in STEPS if unit * m >= 0.999 * rough and not (whole and unit * m % 1))


def labels(values: list[float]) -> list[str]:
    """Formats the labels of an axis's ticks, with enough digits to distinguish them."""
    largest, apart = max(abs(v) for v in values), values[1] - values[0] if len(values) > 1 else 1.0
    unit, suffix = next(((u, s) for u, s in UNITS if largest >= u), (1.0, ""))
    unit = 1e3 if suffix == "k" else unit
    digits = next((d for d in range(8) if math.isclose(round(apart / unit, d), apart / unit, rel_tol=1e-6)), 8)
    if digits > 4 or largest >= 1e13:
        power = math.floor(math.log10(largest))
        digits = next(d for d in range(16) if math.isclose(round(apart / 10**power, d), apart / 10**power, rel_tol=1e-6))
        return ["0" if v == 0 else f"{v / 10**power:.{digits}f}e{power}" for v in values]
    return ["0" if v == 0 else f"{v / unit:,.{digits}f}{suffix}" for v in values]


def lines(title: str, curves: list[Curve], x_range: tuple[float, float], unit: str = "") -> str:
    """Draws one chart with curves over the steps of `x_range`. Returns an empty text if no curve has points.

    Values that aren't finite are left out.
    """
    finite = [c._replace(points=thin(sorted(p for p in c.points if math.isfinite(p[0]) and math.isfinite(p[1])))) for c in curves]
    kept = [c for c in finite if c.points]
    if not kept:
        return ""
    (x0, x1), values = x_range, [y for c in kept for _, y in c.points]
    x1 = x1 if x1 > x0 else x0 + 1
    levels = ticks(min(values), max(values))
    y0, y1 = levels[0], levels[-1]

    def across(x: float) -> float:
        return (x - x0) / (x1 - x0)

    def down(y: float) -> float:
        return (y1 - y) / (y1 - y0)

    out = _levels(levels)
    steps = [x for x in ticks(x0, x1, 9, whole=True) if x0 <= x <= x1]
    for i, (x, text) in enumerate(zip(steps, labels(steps), strict=True)):
        minor = " minor" if i % 2 else ""
        out.append(f'<text class="label{minor}" x="{100 * across(x):.2f}%" y="100%" dy="18" text-anchor="middle">{text}</text>')
    out.append('<text class="label" x="-8" y="100%" dy="18" text-anchor="end">step</text>')
    paths, dots, legend = [], [], []
    for i, curve in enumerate(kept):
        ink = f"ink{i % INKS}"
        if not curve.mark and len(curve.points) > 1:
            path = " ".join(f"{1000 * across(x):.1f},{1000 * down(y):.1f}" for x, y in curve.points)
            paths.append(f'<polyline class="{ink}" points="{path}"/>')
        if curve.mark or len(curve.points) <= 40:
            dots += [
                f'<circle class="{ink}" cx="{100 * across(x):.2f}%" cy="{100 * down(y):.2f}%" r="3"/>' for x, y in curve.points
            ]
        legend.append((ink, escape(curve.name), _value(curve.points[-1][1])))
    inner = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{"".join(paths)}</svg>'
    payload = json.dumps([{"name": c.name, "points": [[x, float(f"{y:.7g}")] for x, y in c.points]} for c in kept])
    data = f' data-curves="{escape(payload)}" data-range="{x0:g} {x1:g}"'
    unit = f" <span>{escape(unit)}</span>" if unit else ""
    return _chart(title, ", ".join(c.name for c in kept), legend, [*out, inner, *dots], unit, data)


def _levels(levels: list[float]) -> list[str]:
    """Draws the horizontal grid lines of a value axis, with their labels."""
    out, low, high = list[str](), levels[0], levels[-1]
    for level, text in zip(levels, labels(levels), strict=True):
        place = f"{100 * (high - level) / (high - low):.2f}%"
        out.append(f'<line class="grid" x1="0" x2="100%" y1="{place}" y2="{place}"/>')
        out.append(f'<text class="label" x="-8" y="{place}" dy="4" text-anchor="end">{text}</text>')
    return out


def _chart(title: str, about: str, legend: list[tuple[str, str, str]], drawn: list[str], unit: str = "", data: str = "") -> str:
    """Builds the frame of a chart. `about`: a description of the chart in words. `legend`: (color class, name, value) of each
    curve."""
    entries = "".join(f'<span><i class="{ink}"></i>{name} <b>{value}</b></span>' for ink, name, value in legend)
    return (
        f'<figure class="chart"{data}><figcaption>{escape(title)}{unit}</figcaption><div class="legend">{entries}</div>'
        f'<div class="plot"><svg role="img" aria-label="{escape(f"{title}: {about}")}">{"".join(drawn)}</svg></div></figure>'
    )


def _value(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e13 else f"{value:.5g}"


def waterfall(title: str, parts: dict[str, float], colours: dict[str, str]) -> str:
    """Draws seconds by part as a waterfall chart. The largest part comes first, and each bar starts at the end of the previous
    bar."""
    shown = sorted(((name, seconds) for name, seconds in parts.items() if seconds > 0), key=lambda kv: -kv[1])
    total, left, rows = sum(seconds for _, seconds in shown), 0.0, []
    for name, seconds in shown:
        bar = _bar(left / total, seconds / total, colours.get(name, "#888"))
        rows.append(f"<div><span>{escape(name)}</span>{bar}<span>{seconds:,.1f} s, {seconds / total:.1%}</span></div>")
        left += seconds
    return f'<figure class="parts"><figcaption>{escape(title)}</figcaption>{"".join(rows)}</figure>' if rows else ""


def bars(title: str, rows: list[tuple[str, float, str]], colour: str = "var(--ink0)") -> str:
    """Draws one bar per row of (name, length as a share of the longest possible bar, text)."""
    shown = [
        f"<div><span>{escape(name)}</span>{_bar(0, share, colour)}<span>{escape(text)}</span></div>" for name, share, text in rows
    ]
    return f'<figure class="bars"><figcaption>{escape(title)}</figcaption>{"".join(shown)}</figure>' if rows else ""


def timeline(title: str, spans: list[tuple[float, float, str, str]]) -> str:
    """Draws spans (begin, end, color, text), one per row. The rows share an axis, which shows the seconds since the earliest
    begin."""
    if not spans:
        return ""
    first, last = min(s[0] for s in spans), max(s[1] for s in spans)
    whole = max(1e-9, last - first)
    rows = [
        f"<div><span>{escape(text)}</span>{_bar((begin - first) / whole, (end - begin) / whole, colour)}</div>"
        for begin, end, colour, text in spans
    ]
    head = f"<figcaption>{escape(title)} <span>{whole:,.0f} s in all</span></figcaption>"
    return f'<figure class="spans">{head}{"".join(rows)}</figure>'


def _bar(left: float, width: float, colour: str) -> str:
    return f'<span class="track"><i style="left:{100 * left:.2f}%;width:{100 * width:.2f}%;background:{colour}"></i></span>'


@dataclass(frozen=True)
class Axis:
    """Maps values to positions from 0 to 1, on a linear or logarithmic scale. On a logarithmic scale, values of 0 or less are
    at position 0."""

    low: float
    high: float
    log: bool
    bars: int

    def across(self, value: float) -> float:
        if self.log:
            if value <= 0:
                return 0.0
            value = math.log10(value)
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def bar(self, value: float) -> int:
        return min(self.bars - 1, int(self.across(value) * self.bars))

    def marks(self) -> list[tuple[float, str]]:
        """Returns the axis's ticks as (position from 0 to 1, label)."""
        if self.log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            return [(self.across(10.0**p), f"{10.0**p:g}") for p in powers]
        values = [v for v in ticks(self.low, self.high, 6) if self.low <= v <= self.high]
        return [(self.across(v), text) for v, text in zip(values, labels(values), strict=True)] if values else []


def axis(values: list[float], limits: list[float]) -> Axis:
    """Chooses an axis that covers all values and limits."""
    positive = [v for v in [*values, *limits] if v > 0]
    if min(values) >= 0 and positive and max(positive) / min(positive) >= WIDE:
        low, high = math.log10(min(positive)), math.log10(max(positive))
        edge = (high - low) / BARS
        return Axis(low - 2 * edge, high + edge, True, BARS)
    low, high = min([*values, *limits]), max([*values, *limits])
    distinct = sorted({*values})
    step = min((b - a for a, b in itertools.pairwise(distinct)), default=0.0)
    step = max(step, (high - low) / BARS) or 1.0
    bars = round((high - low) / step) + 1
    return Axis(low - step / 2, low - step / 2 + bars * step, False, bars)


def histogram(title: str, bins: Bins, limits: list[float]) -> str:
    """Draws a histogram of a measure: kept documents below, dropped documents above. Returns an empty text if no value is
    finite.

    `limits`: the thresholds, drawn as vertical lines.
    """
    values = {float(value): pair for value, pair in bins.items() if math.isfinite(float(value))}
    if not values:
        return ""
    limits = sorted({float(v) for v in limits if math.isfinite(v)})
    scale = axis(list(values), limits)
    kept, dropped = [0] * scale.bars, [0] * scale.bars
    for value, (stayed, went) in values.items():
        kept[scale.bar(value)] += stayed
        dropped[scale.bar(value)] += went
    levels = ticks(0, max(k + d for k, d in zip(kept, dropped, strict=True)), 4, whole=True)
    drawn = [*_levels(levels), *_rects(kept, dropped, levels[-1], scale.bars)]
    for at, text in scale.marks():
        drawn.append(f'<text class="label" x="{100 * at:.2f}%" y="100%" dy="18" text-anchor="middle">{text}</text>')
    for value in limits:
        place = f"{100 * scale.across(value):.2f}%"
        drawn.append(f'<line class="limit" x1="{place}" x2="{place}" y1="0" y2="100%"/>')
        drawn.append(f'<text class="told" x="{place}" y="0" dy="-4" text-anchor="middle">{value:g}</text>')
    stayed, went = sum(kept), sum(dropped)
    about = f"{stayed:,} kept, {went:,} dropped, thresholds {', '.join(f'{v:g}' for v in limits) or 'none'}"
    return _chart(title, about, [("ink0", "kept", f"{stayed:,}"), ("ink1", "dropped", f"{went:,}")], drawn)


def _rects(kept: list[int], dropped: list[int], top: float, bars: int) -> list[str]:
    out = []
    for i, pair in enumerate(zip(kept, dropped, strict=True)):
        below = 0
        for ink, count in zip(("ink0", "ink1"), pair, strict=True):
            if count:
                x, y = f"{100 * (i + 0.06) / bars:.2f}%", f"{100 * (1 - (below + count) / top):.2f}%"
                size = f'width="{88 / bars:.2f}%" height="{max(0.4, 100 * count / top):.2f}%"'
                out.append(f'<rect class="{ink}" x="{x}" y="{y}" {size}/>')
                below += count
    return out
