"""Schedules sources by stride, with arithmetic in place of tables: the source of each position, and counts before a position.

Source s, whose share is c_s of P, has its j-th sample due at time (j + 1/2 - d_s) * P / c_s, in positions; d_s is what the
source is owed when the mix begins. The positions take the samples in the order in which they are due (of equals, the first
source's first), so every prefix is within a sample or so of every source's share (Waldspurger and Weihl 1995).

All times are compared as whole numbers, so the order is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from heliostat.errors import ConfigError

MAX_PERIOD = 4_000_000
HALVES = 256  # in the order, what a source is owed counts in 1/512 of a sample; the account itself is finer
OWED = 1 << 40  # parts of a sample in which the account of what a source is owed is kept


def proportions(weights: Sequence[float]) -> list[int]:
    """Reduces weights to the smallest whole numbers in the same proportions; ConfigError if they add up to too long a period.

    The bound keeps every product in 64 bits, and the fractions that are compared distinct in double precision.
    """
    shares = [Fraction(repr(w)) for w in weights]
    scale = math.lcm(*(s.denominator for s in shares))
    counts = [int(s * scale) for s in shares]
    counts = [c // math.gcd(*counts) for c in counts]
    if sum(counts) > MAX_PERIOD:
        raise ConfigError(f"data.sources: weights {list(weights)} have too many digits to be honoured exactly; round them")
    return counts


class Mixture:
    """Mixes sources endlessly; `owed` is what each source is owed at the beginning, in units of `unit` samples, times OWED."""

    def __init__(self, weights: Sequence[float], unit: int = 1, owed: Sequence[int] | None = None) -> None:
        self.unit = unit  # consecutive positions of one source
        self.parts = proportions(weights)
        self.period = sum(self.parts)
        self._owed = list(owed or [0] * len(self.parts))
        self._part = np.array(self.parts, dtype=np.int64)
        self._debt = np.array([round(d * 2 * HALVES / OWED) for d in self._owed], dtype=np.int64)
        self._parts_of = 2 * HALVES * self.period  # a unit of a source, in what `_by` divides
        self._begun = np.where(self._part > 0, (self._debt - HALVES) * self.period + self._parts_of - 1, 0)

    @property
    def shares(self) -> np.ndarray:
        """Returns the sources' shares, which sum to 1: float64 [sources]."""
        return self._part / self.period

    def counts(self, position: int) -> np.ndarray:
        """Counts the samples of each source before a position, int64 [sources]."""
        units, inside = divmod(int(position), self.unit)
        counts, time = self._before(units)
        source, _ = self._due(counts, self._by(time + 1), time)
        left = units - int(counts.sum())
        counts = (counts + np.bincount(source[:left], minlength=len(counts))) * self.unit
        counts[source[left]] += inside
        return counts

    def lay_out(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Computes (source, index of the sample among the source's) for the positions [begin, end), both int64."""
        first, last = begin // self.unit, -(-end // self.unit)
        counts, time = self._before(first)
        source, item = self._due(counts, self._by(self._before(last)[1] + 1), time)
        wanted = slice(first - int(counts.sum()), last - int(counts.sum()))
        source, item = source[wanted], item[wanted]
        if self.unit > 1:
            inside = slice(begin - first * self.unit, end - first * self.unit)
            source = np.repeat(source, self.unit)[inside]
            item = (item[:, None] * self.unit + np.arange(self.unit)).ravel()[inside]
        return source, item

    def owed(self, position: int) -> list[int]:
        """Computes what each source is owed at the start of a unit, in units times OWED: its share less what was taken of it."""
        units = position // self.unit
        taken = (self.counts(position) // self.unit).tolist()
        due = [(c * units * OWED + self.period // 2) // self.period for c in self.parts]
        return [d + new - n * OWED for d, new, n in zip(self._owed, due, taken, strict=True)]

    def _by(self, time: int) -> np.ndarray:
        """Counts the units of each source that are due before a time (a whole number of positions)."""
        periods, rest = divmod(time, self.period)
        inside = (self._part * (2 * HALVES * rest) + self._begun) // self._parts_of  # rounded up
        return np.maximum(self._part * periods + inside, 0)

    def _before(self, units: int) -> tuple[np.ndarray, int]:
        """Finds the last time before which at most `units` units are due: (units of each source due before it, the time)."""
        most = int(np.abs(self._debt).sum()) // (2 * HALVES) + len(self.parts) + 1
        high = units + most  # a time before which more are due
        low, stride = high - 2 * most, 2 * most
        while int(self._by(low).sum()) > units:
            high, low, stride = low, low - stride, 2 * stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int(self._by(middle).sum()) <= units else (low, middle)
        return self._by(low), low

    def _due(self, first: np.ndarray, last: np.ndarray, time: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorts the sources' units [first, last) by when they are due, from `time` on: (source, number of the unit)."""
        sizes = last - first
        source = np.repeat(np.arange(len(sizes)), sizes)
        item = np.arange(len(source)) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)
        if np.count_nonzero(sizes) > 1:
            periods, rest = divmod(time, self.period)
            part = self._part[source]
            due = (2 * (item - periods * part) + 1) * HALVES - self._debt[source]
            whole, part_of = np.divmod(due * self.period - 2 * HALVES * rest * part, 2 * HALVES * part)
            order = np.lexsort((source, part_of / (2 * HALVES * part), whole))
            source, item = source[order], item[order]
        return source, item
