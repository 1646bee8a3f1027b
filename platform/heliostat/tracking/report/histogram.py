"""Draws histograms as HTML and SVG text: how many documents had which value of a measure, with the thresholds drawn in."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from html import escape

from heliostat.tracking.report.svg import labels, ticks

BARS = 40  # at most
WIDE = 100  # times: from here on the axis is logarithmic
Bins = dict[str, list[int]]  # value: documents kept, dropped


@dataclass(frozen=True)
class Axis:
    """Places values from 0 to 1: evenly, or their logarithms; then what is not positive comes first."""

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
        """Chooses the ticks: (place, label)."""
        if self.log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            return [(self.across(10.0**p), f"{10.0**p:g}") for p in powers]
        values = [v for v in ticks(self.low, self.high, 6) if self.low <= v <= self.high]
        return [(self.across(v), text) for v, text in zip(values, labels(values), strict=True)] if values else []


def axis(values: list[float], limits: list[float]) -> Axis:
    """Chooses the axis on which all values and limits have their place."""
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
    """Draws a measure's bins, those that were kept below those that were dropped; empty if no value is finite."""
    found = {float(value): pair for value, pair in bins.items() if math.isfinite(float(value))}
    if not found:
        return ""
    limits = sorted({float(v) for v in limits if math.isfinite(v)})
    scale = axis(list(found), limits)
    kept, dropped = [0] * scale.bars, [0] * scale.bars
    for value, (stayed, went) in found.items():
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
    legend = f'<span><i class="ink0"></i>kept <b>{stayed:,}</b></span><span><i class="ink1"></i>dropped <b>{went:,}</b></span>'
    aria = escape(f"{title}: {stayed:,} kept, {went:,} dropped, thresholds {', '.join(f'{v:g}' for v in limits) or 'none'}")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><div class="legend">{legend}</div>'
        f'<div class="plot"><svg role="img" aria-label="{aria}">{"".join(drawn)}</svg></div></figure>'
    )


def _levels(levels: list[float]) -> list[str]:
    out = []
    for level, text in zip(levels, labels(levels), strict=True):
        place = f"{100 * (1 - level / levels[-1]):.2f}%"
        out.append(f'<line class="grid" x1="0" x2="100%" y1="{place}" y2="{place}"/>')
        out.append(f'<text class="label" x="-8" y="{place}" dy="4" text-anchor="end">{text}</text>')
    return out


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
