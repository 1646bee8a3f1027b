"""Draws charts as HTML and SVG text, without any library: curves over steps, stacked bars, and a time line. Pure functions.

They take the width that they are given: places are percentages, so that text keeps its size on a wide screen and a narrow one.
The page's style draws them (`style.css`), and its script shows the values below the pointer (`hover.js`).
"""

from __future__ import annotations

import json
import math
from html import escape
from typing import NamedTuple

Points = list[tuple[float, float]]
INKS = 6  # colours of curves, --ink0 and so on in the style
MOST = 1200  # points of a curve that are drawn
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # of ticks, times a power of ten
UNITS = ((1e9, "G"), (1e6, "M"), (1e4, "k"))  # of labels from this size on


class Curve(NamedTuple):
    """Holds one curve of a chart; `mark`: drawn as dots, because it has values at some steps only."""

    name: str
    points: Points
    mark: bool = False


def thin(points: Points, most: int = MOST) -> Points:
    """Reduces a curve to at most `most` points.

    Of each stretch it keeps the lowest and the highest, so that no spike is lost.
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
    """Chooses about `count` round numbers for an axis, from the last one below `low` to the first one above `high`.

    `whole`: without fractions.
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
    """Formats the labels of an axis's ticks, with as many digits as tell them apart."""
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
    """Draws one chart of curves over the steps of `x_range`; empty if no curve has points.

    Values that are not finite are left out.
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

    out = []
    for y, text in zip(levels, labels(levels), strict=True):
        place = f"{100 * down(y):.2f}%"
        out.append(f'<line class="grid" x1="0" x2="100%" y1="{place}" y2="{place}"/>')
        out.append(f'<text class="label" x="-8" y="{place}" dy="4" text-anchor="end">{text}</text>')
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
        legend.append(f'<span><i class="{ink}"></i>{escape(curve.name)} <b>{_value(curve.points[-1][1])}</b></span>')
    inner = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{"".join(paths)}</svg>'
    told = json.dumps([{"name": c.name, "points": [[x, float(f"{y:.7g}")] for x, y in c.points]} for c in kept])
    aria = escape(f"{title}: {', '.join(c.name for c in kept)}")
    return (
        f'<figure class="chart" data-curves="{escape(told)}" data-range="{x0:g} {x1:g}"><figcaption>{escape(title)}'
        f'{f" <span>{escape(unit)}</span>" if unit else ""}</figcaption><div class="legend">{"".join(legend)}</div>'
        f'<div class="plot"><svg role="img" aria-label="{aria}">{"".join(out)}{inner}{"".join(dots)}</svg></div></figure>'
    )


def _value(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e13 else f"{value:.5g}"


def waterfall(title: str, parts: dict[str, float], colours: dict[str, str]) -> str:
    """Draws seconds by part as a waterfall: the largest first, each beginning where the one before ends."""
    shown = sorted(((name, seconds) for name, seconds in parts.items() if seconds > 0), key=lambda kv: -kv[1])
    total, left, rows = sum(seconds for _, seconds in shown), 0.0, []
    for name, seconds in shown:
        bar = _bar(left / total, seconds / total, colours.get(name, "#888"))
        rows.append(f"<div><span>{escape(name)}</span>{bar}<span>{seconds:,.1f} s, {seconds / total:.1%}</span></div>")
        left += seconds
    return f'<figure class="parts"><figcaption>{escape(title)}</figcaption>{"".join(rows)}</figure>' if rows else ""


def bars(title: str, rows: list[tuple[str, float, str]], colour: str = "var(--ink0)") -> str:
    """Draws a bar a row: (name, its share of the longest that there could be, text)."""
    shown = [
        f"<div><span>{escape(name)}</span>{_bar(0, share, colour)}<span>{escape(text)}</span></div>" for name, share, text in rows
    ]
    return f'<figure class="bars"><figcaption>{escape(title)}</figcaption>{"".join(shown)}</figure>' if rows else ""


def timeline(title: str, spans: list[tuple[float, float, str, str]]) -> str:
    """Draws spans (begin, end, colour, text), one a row, on one axis of seconds from the first begin."""
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
