"""Interleaves sources by weight (`Mixture`), and cuts the global sequence into sections, windows, and blocks. Pure functions.

Weights may change at given steps (a curriculum), and a source may be used up (`max_epochs`). A section ends at each of these
changes.

Sources are scheduled by stride (Waldspurger and Weihl 1995), without tables. Source s has the share c_s of P. Its sample j is
due at time (j + 1/2 - d_s) * P / c_s, in positions. d_s is the number of samples owed to the source when the mixture begins.
Positions take samples in the order of these times; at equal times, the source with the lower index comes first. So every prefix
has each source's share to within about one sample. Times are compared as whole numbers, so every machine computes the same
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import numpy as np
from pydantic import Field

from heliostat.errors import ConfigError, DataError
from heliostat.storage.records import closed

BLOCK_BYTES = 8 << 20  # Ray Data takes 10-20 ms per block of any size, so blocks are megabytes
WINDOW_BYTES = 32 << 20
MAX_STEPS_PER_BLOCK = 128
MAX_PERIOD = 4_000_000
HALVES = 256  # the order counts owed samples in 1/512 of a sample; `owed` is finer
OWED = 1 << 40  # units of `owed` per sample
LARGEST = 1 << 27  # samples of a step or a window: larger values can't be from a valid plan, and would be read at once
Size = Annotated[int, Field(gt=0, le=LARGEST)]


@closed
@dataclass(frozen=True)
class Shape:
    """Describes how the global sequence is cut into windows and blocks. The run records the shape, because the sample order
    depends on it."""

    batch: Size  # G: global batch size
    lanes: Size  # C: virtual ranks
    steps_per_block: Annotated[Size, Field(alias="superstep")]  # K; data plans record it under its first name
    window: Size  # in samples: a multiple of the block
    unit: Size = 1  # consecutive samples of one source; divides a virtual rank's samples of a step

    @property
    def per_lane(self) -> int:
        """Returns the number of samples of a virtual rank in a step."""
        return self.batch // self.lanes

    @property
    def block(self) -> int:
        return self.steps_per_block * self.per_lane


def choose_shape(batch: int, lanes: int, sample_bytes: int, window: int | None = None, one_source: bool = False) -> Shape:
    """Chooses blocks of about 8 MB and at most 128 steps, and windows of about 32 MB, or of at least `window` samples.

    `one_source`: all samples of a virtual rank in a step come from one source.
    """
    per_lane = batch // lanes
    steps_per_block = min(MAX_STEPS_PER_BLOCK, max(1, BLOCK_BYTES // (per_lane * sample_bytes)))
    block = steps_per_block * per_lane
    wanted = window or WINDOW_BYTES // sample_bytes
    return Shape(batch, lanes, steps_per_block, block * max(1, -(-wanted // block)), per_lane if one_source else 1)


def proportions(weights: Sequence[float]) -> list[int]:
    """Reduces weights to the smallest whole numbers in the same proportions.

    Raises ConfigError if the numbers add up to more than MAX_PERIOD.

    The limit keeps every product within 64 bits. The limit also keeps different due times different in double precision.
    """
    shares = [Fraction(repr(w)) for w in weights]
    scale = math.lcm(*(s.denominator for s in shares))
    counts = [int(s * scale) for s in shares]
    counts = [c // math.gcd(*counts) for c in counts]
    if sum(counts) > MAX_PERIOD:
        raise ConfigError(f"data.sources: weights {list(weights)} have too many digits for exact mixing. Round them")
    return counts


class Mixture:
    """Mixes the samples of sources into an endless sequence.

    `unit`: number of consecutive samples of one source; `owed`: number of units owed to each source at the start, times OWED.
    """

    def __init__(self, weights: Sequence[float], unit: int = 1, owed: Sequence[int] | None = None) -> None:
        self.unit = unit  # consecutive positions of one source
        self.parts = proportions(weights)
        self.period = sum(self.parts)
        self._owed = list(owed or [0] * len(self.parts))
        self._part = np.array(self.parts, dtype=np.int64)
        self._debt = np.array([round(d * 2 * HALVES / OWED) for d in self._owed], dtype=np.int64)
        self._parts_of = 2 * HALVES * self.period  # one unit of a source, in the scale of `_by`
        self._begun = np.where(self._part > 0, (self._debt - HALVES) * self.period + self._parts_of - 1, 0)

    @property
    def shares(self) -> np.ndarray:
        """Returns the sources' shares, which sum to 1: float64 [sources]."""
        return self._part / self.period

    def counts(self, position: int) -> np.ndarray:
        """Counts the samples of each source before a position: int64 [sources]."""
        units, inside = divmod(int(position), self.unit)
        counts, time = self._before(units)
        source, _ = self._due(counts, self._by(time + 1), time)
        left = units - int(counts.sum())
        counts = (counts + np.bincount(source[:left], minlength=len(counts))) * self.unit
        counts[source[left]] += inside
        return counts

    def lay_out(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Computes the source of each position in [begin, end), and the sample's index in that source: both int64."""
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
        """Computes, for each source, the units owed at the start of a unit, times OWED: the source's share minus the units
        already taken."""
        units = position // self.unit
        taken = (self.counts(position) // self.unit).tolist()
        due = [(c * units * OWED + self.period // 2) // self.period for c in self.parts]
        return [d + new - n * OWED for d, new, n in zip(self._owed, due, taken, strict=True)]

    def _by(self, time: int) -> np.ndarray:
        """Counts the units of each source that are due before a time, which is a whole number of positions."""
        periods, rest = divmod(time, self.period)
        inside = (self._part * (2 * HALVES * rest) + self._begun) // self._parts_of  # rounded up
        return np.maximum(self._part * periods + inside, 0)

    def _before(self, units: int) -> tuple[np.ndarray, int]:
        """Finds the last time before which at most `units` units are due; returns (units per source due before it, time)."""
        most = int(np.abs(self._debt).sum()) // (2 * HALVES) + len(self.parts) + 1
        high = units + most  # a time before which more units are due
        low, stride = high - 2 * most, 2 * most
        while int(self._by(low).sum()) > units:
            high, low, stride = low, low - stride, 2 * stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int(self._by(middle).sum()) <= units else (low, middle)
        return self._by(low), low

    def _due(self, first: np.ndarray, last: np.ndarray, time: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorts the units [first, last) of all sources by due time, which is counted from `time`.

        Returns (source, unit number).
        """
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


@dataclass(frozen=True)
class Section:
    """Describes consecutive steps with the same source weights and the same blocks. A change of weights or a used-up source
    starts a new section."""

    first_step: int
    steps: int | None  # a multiple of `steps_per_block`; None: without end
    steps_per_block: int
    begin: int  # position of its first sample
    mixture: Mixture
    origin: int  # position at which the mixture begins
    base: np.ndarray  # int64 [sources]: samples of each source before `origin`

    def before(self, position: int) -> np.ndarray:
        """Counts the samples of each source before a position in this section, or before its end: int64 [sources]."""
        return self.base + self.mixture.counts(position - self.origin)

    def lay_out(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Computes (source, index in the source's stream) for this section's positions [begin, end), both int64."""
        source, item = self.mixture.lay_out(begin - self.origin, end - self.origin)
        return source, self.base[source] + item


def sections(
    mix: list[tuple[int, list[float]]], caps: list[int | None], shape: Shape, carry: bool = True
) -> tuple[list[Section], int | None]:
    """Cuts the run into sections, and finds the step at which the run's data runs out (None: never).

    `mix`: (step, weights from this step on), ascending; `caps`: maximum number of samples per source. A source is left out from
    the first step that would exceed its cap, and the others share its weight. If a section's steps aren't a multiple of the
    round, the remaining steps form a section with one shorter round. So a change takes effect exactly at its step.

    `carry`: the samples owed to a source are carried over every change. So a source's number of samples is the sum of its
    shares to within a few samples, for any number of changes. Without `carry`, each section begins from scratch, as in version
    1 of the data plan.
    """
    out: list[Section] = []
    origin, base, owed = mix[0][0], np.zeros(len(caps), dtype=np.int64), None
    most = np.array([np.iinfo(np.int64).max if c is None else c for c in caps])
    ends = [*(step for step, _ in mix[1:]), None]
    for (step, weights), end in zip(mix, ends, strict=True):
        left = list(weights)
        while end is None or step < end:
            if not any(left):
                return out, step
            mixture = Mixture(left, shape.unit, owed)
            steps = _affordable(mixture, most - base, shape.batch, None if end is None else end - step)
            begin, over = step, np.zeros(len(left), dtype=bool)
            if end is None or steps != end - step:
                over = mixture.counts(((steps or 0) + 1) * shape.batch) > most - base
            for part, steps_per_block in _cut(steps, shape.steps_per_block):
                at = (begin - origin) * shape.batch
                out.append(Section(step, part, steps_per_block, (step - origin) * shape.batch, mixture, at, base))
                if part is None:
                    return out, None
                step += part
                if not carry:
                    base, begin = base + mixture.counts(part * shape.batch), step
            if carry:
                taken = (step - begin) * shape.batch
                base, owed = base + mixture.counts(taken), mixture.owed(taken)
            if not steps and not any(w and stop for w, stop in zip(left, over, strict=True)):
                raise DataError(
                    f"data.sources: after step {step}, version 1 of the data plan exceeds a source's max_epochs "
                    "and can't continue. Train under another name, so that the run gets a new data plan"
                )
            left = [0.0 if stop else w for w, stop in zip(left, over, strict=True)]
    raise AssertionError("the last section of the data order must be endless, or end when a source runs out of data")


def _affordable(mixture: Mixture, left: np.ndarray, batch: int, most: int | None) -> int | None:
    """Computes for how many complete steps the sources' remaining samples (`left`) are enough.

    The result is at most `most`, or None if the samples never run out.
    """

    def fits(steps: int) -> bool:
        return bool((mixture.counts(steps * batch) <= left).all())

    if most is None and not (mixture.shares[left < np.iinfo(np.int64).max // 2] > 0).any():
        return None
    if most is not None and fits(most):
        return most
    low, high = 0, most or 1
    while most is None and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _cut(steps: int | None, steps_per_block: int) -> list[tuple[int | None, int]]:
    """Cuts `steps` steps into sections; returns (steps, steps per block) for each."""
    if steps is None:
        return [(None, steps_per_block)]
    whole, rest = steps // steps_per_block * steps_per_block, steps % steps_per_block
    return [(n, k) for n, k in ((whole, steps_per_block), (rest, rest)) if n]
