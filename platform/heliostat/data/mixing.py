"""Interleaves sources by weight (`Mixture`), and cuts a run's global sequence into sections, windows and blocks: pure functions.

Weights may change at given steps (a curriculum), and a source may be used up (`max_epochs`): `sections` cuts the run there.

Sources are scheduled by stride, with arithmetic in place of tables. Source s, whose share is c_s of P, has its j-th sample due at
time (j + 1/2 - d_s) * P / c_s, in positions; d_s is what the source is owed when the mix begins. The positions take the samples
in the order in which they are due (of equals, the first source's first), so every prefix is within a sample or so of every
source's share (Waldspurger and Weihl 1995). All times are compared as whole numbers, so the order is the same on every machine.
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

BLOCK_BYTES = 8 << 20  # Ray Data costs 10-20 ms a block whatever its size, so blocks are megabytes
WINDOW_BYTES = 32 << 20
MAX_STEPS_PER_BLOCK = 128
MAX_PERIOD = 4_000_000
HALVES = 256  # in the order, what a source is owed counts in 1/512 of a sample; the account itself is finer
OWED = 1 << 40  # parts of a sample in which the account of what a source is owed is kept
LARGEST = 1 << 27  # samples of a step or a window: what is beyond it was never a plan, and would be read at once
Size = Annotated[int, Field(gt=0, le=LARGEST)]


@closed
@dataclass(frozen=True)
class Shape:
    """Describes how the global sequence is cut; recorded with the run, because the order follows from it."""

    batch: Size  # G
    lanes: Size  # C
    steps_per_block: Annotated[Size, Field(alias="superstep")]  # K; plans record it under its first name
    window: Size  # samples, a multiple of the block
    unit: Size = 1  # consecutive samples of one source; divides a lane's samples of a step

    @property
    def per_lane(self) -> int:
        """Returns the samples of a lane in a step."""
        return self.batch // self.lanes

    @property
    def block(self) -> int:
        return self.steps_per_block * self.per_lane


def choose_shape(batch: int, lanes: int, sample_bytes: int, window: int | None = None, one_source: bool = False) -> Shape:
    """Chooses blocks of about 8 MB and at most 128 steps, and windows of about 32 MB, or of at least `window` samples.

    `one_source`: all samples of a lane in a step are of one source.
    """
    per_lane = batch // lanes
    steps_per_block = min(MAX_STEPS_PER_BLOCK, max(1, BLOCK_BYTES // (per_lane * sample_bytes)))
    block = steps_per_block * per_lane
    wanted = window or WINDOW_BYTES // sample_bytes
    return Shape(batch, lanes, steps_per_block, block * max(1, -(-wanted // block)), per_lane if one_source else 1)


def proportions(weights: Sequence[float]) -> list[int]:
    """Reduces weights to the smallest whole numbers in the same proportions; ConfigError if they add up to too long a period.

    The bound keeps every product in 64 bits, and the fractions that are compared distinct in double precision.
    """
    shares = [Fraction(repr(w)) for w in weights]
    scale = math.lcm(*(s.denominator for s in shares))
    counts = [int(s * scale) for s in shares]
    counts = [c // math.gcd(*counts) for c in counts]
    if sum(counts) > MAX_PERIOD:
        raise ConfigError(f"data.sources: weights {list(weights)} have too many digits for exact mixing. Round them")
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


@dataclass(frozen=True)
class Section:
    """Describes consecutive steps with one mixture and one cut; a change of weights or a used-up source starts a new section."""

    first_step: int
    steps: int | None  # a multiple of `steps_per_block`; None: endless
    steps_per_block: int
    begin: int  # position of its first sample
    mixture: Mixture
    origin: int  # the position at which the mixture begins
    base: np.ndarray  # int64 [sources], samples of each source before `origin`

    def before(self, position: int) -> np.ndarray:
        """Counts the samples of each source before a position of this section, or before its end: int64 [sources]."""
        return self.base + self.mixture.counts(position - self.origin)

    def lay_out(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Computes (source, index in the source's stream) of this section's positions [begin, end), both int64."""
        source, item = self.mixture.lay_out(begin - self.origin, end - self.origin)
        return source, self.base[source] + item


def sections(
    mix: list[tuple[int, list[float]]], caps: list[int | None], shape: Shape, carry: bool = True
) -> tuple[list[Section], int | None]:
    """Cuts the run into sections, and finds the step at which its data runs out (None: never).

    `mix`: (step, weights from there on), ascending; `caps`: the most samples to take of each source. A source is left out
    from the first step that would exceed its cap; the others share its weight. Where a section's steps are no multiple of
    the round, the rest is a section of one shorter round, so that a change falls exactly on its step.

    What a source is owed is carried over every change, so its samples are the sum of its shares to within a few, however
    often the weights change. Without `carry` each section begins from scratch: so it was in version 1 of the data plan.
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
                    "and can't continue. Train under another name, which makes a new data plan"
                )
            left = [0.0 if stop else w for w, stop in zip(left, over, strict=True)]
    raise AssertionError("the last section is endless, or runs out of data")


def _affordable(mixture: Mixture, left: np.ndarray, batch: int, most: int | None) -> int | None:
    """Computes how many whole steps the sources' remaining samples (`left`) last, at most `most`; None if they last for ever."""

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
    """Cuts `steps` steps into sections: a (steps, steps per block) for each."""
    if steps is None:
        return [(None, steps_per_block)]
    whole, rest = steps // steps_per_block * steps_per_block, steps % steps_per_block
    return [(n, k) for n, k in ((whole, steps_per_block), (rest, rest)) if n]
