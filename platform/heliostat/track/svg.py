"""Charts as SVG text, without any library: lines over steps, stacked bars, and a time line. Pure functions."""

from __future__ import annotations

import math
from html import escape

Points = list[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 64, 28, 12
INK = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
MOST = 1200  # points of a line that are drawn


def thin(points: Points, most: int = MOST) -> Points:
    """At most so many points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    out: Points = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        out += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return out


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= 0.999 * rough)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def lines(title: str, curves: dict[str, Points], x_label: str = "step") -> str:
    """One chart; curves by their legend. Values that are not finite are left out."""
    kept = {k: thin([p for p in points if math.isfinite(p[1])]) for k, points in curves.items()}
    kept = {k: points for k, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + max(1e-9, abs(y0)))
    wide, high = WIDTH - LEFT - 12, HEIGHT - BOTTOM - TOP

    def at(x: float, y: float) -> str:
        return f"{LEFT + (x - x0) / (x1 - x0) * wide:.1f},{TOP + (y1 - y) / (y1 - y0) * high:.1f}"

    parts = []
    for y in ticks(y0, y1):
        place = at(x0, y).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{place}" y2="{place}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place}" dy="4" text-anchor="end">{y:g}</text>')
    for x in ticks(x0, x1):
        parts.append(f'<text x="{at(x, y0).split(",")[0]}" y="{HEIGHT - 10}" text-anchor="middle">{x:g}</text>')
    for i, (name, points) in enumerate(kept.items()):
        path = " ".join(at(x, y) for x, y in points)
        dots = f'<circle cx="{path.split(",")[0]}" cy="{path.split(",")[1]}" r="3"/>' if len(points) == 1 else ""
        colour = INK[i % len(INK)]
        parts.append(f'<g fill="{colour}"><polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>{dots}')
        parts.append(f'<text x="{LEFT + 8 + 150 * i}" y="{TOP + 4}" fill="{colour}">{escape(name)}</text></g>')
    return _figure(title, HEIGHT, parts, x_label)


def waterfall(title: str, parts: dict[str, float], colours: dict[str, str]) -> str:
    """Seconds by part, each beginning where the one before ends."""
    shown = {k: v for k, v in parts.items() if v > 0}
    total = sum(shown.values())
    if not total:
        return ""
    out, left, wide = [], 0.0, WIDTH - 260
    for i, (name, seconds) in enumerate(sorted(shown.items(), key=lambda kv: -kv[1])):
        y, x = 22 * i + TOP, 110 + left / total * wide
        width = max(1.0, seconds / total * wide)
        out.append(f'<text x="104" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
        out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="16" fill="{colours.get(name, "#888")}"/>')
        out.append(f'<text x="{x + width + 5:.1f}" y="{y + 12}">{seconds:,.1f} s, {seconds / total:.1%}</text>')
        left += seconds
    return _figure(title, 22 * len(shown) + TOP + BOTTOM, out, "seconds")


def timeline(title: str, spans: list[tuple[float, float, str, str]]) -> str:
    """Spans (begin, end, colour, text), one a row, on one axis of seconds from the first begin."""
    if not spans:
        return ""
    first, last = min(s[0] for s in spans), max(s[1] for s in spans)
    scale = (WIDTH - 24) / max(1e-9, last - first)
    out = []
    for i, (begin, end, colour, text) in enumerate(spans):
        x, width, y = 12 + (begin - first) * scale, max(2.0, (end - begin) * scale), TOP + 40 * i
        out.append(f'<text x="12" y="{y + 10}">{escape(text)}</text>')
        out.append(f'<rect x="{x:.1f}" y="{y + 15}" width="{width:.1f}" height="14" fill="{colour}"/>')
    return _figure(title, 40 * len(spans) + TOP + BOTTOM, out, f"{last - first:,.0f} s in all")


def _figure(title: str, height: int, parts: list[str], label: str) -> str:
    body = "".join(parts)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{body}<text x="{WIDTH - 12}" y="{height - 10}" text-anchor="end" '
        f'class="label">{escape(label)}</text></svg></figure>'
    )
