"""How sources are interleaved by weight, and where a run's global sequence is cut: pure functions, like `order`'s.

Weights are honoured exactly over a period, and any prefix is within a sample or so of every source's share (`Mixture`).
Weights may change at given steps (a curriculum), and a source may be used up (`max_epochs`): `sections` cuts the run there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from heliostat.errors import ConfigError

MAX_PERIOD = 4_000_000
ENVELOPE_BYTES = 8 << 20  # Ray Data costs 10-20 ms a block whatever its size, so blocks are megabytes
WINDOW_BYTES = 32 << 20
MAX_SUPERSTEP = 128


def stride_pattern(weights: list[float]) -> np.ndarray:
    """One period of the interleaving: source indices, int16 [P], each source exactly in proportion to its weight.

    Source s's k-th sample is due at virtual time (k + 1/2) / w_s; merging by due time keeps every prefix within a sample
    or so of its share (stride scheduling: Waldspurger and Weihl 1995). ConfigError if the weights need too long a period.
    """
    shares = [Fraction(repr(w)) for w in weights]
    scale = math.lcm(*(s.denominator for s in shares))
    counts = [int(s * scale) for s in shares]
    counts = [c // math.gcd(*counts) for c in counts]
    if sum(counts) > MAX_PERIOD:
        raise ConfigError(f"data.sources: weights {weights} have too many digits to be honoured exactly; round them")
    due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
    return np.repeat(np.arange(len(counts), dtype=np.int16), counts)[np.argsort(due, kind="stable")]


class Mixture:
    """How many samples of each source the first g positions hold, and which source each position has."""

    def __init__(self, weights: list[float], unit: int = 1) -> None:
        self.unit = unit  # consecutive positions of one source
        self.pattern = stride_pattern(weights)
        sources = np.arange(len(weights), dtype=np.int16)
        self.before = np.zeros((len(weights), len(self.pattern) + 1), dtype=np.int64)
        np.cumsum(self.pattern[None, :] == sources[:, None], axis=1, out=self.before[:, 1:])

    def counts(self, positions: np.ndarray | int) -> np.ndarray:
        """int64 [sources, ...]: samples of each source before the positions."""
        units, inside = np.divmod(positions, self.unit)
        periods, rest = np.divmod(units, len(self.pattern))
        whole = self.unit * (np.multiply.outer(self.before[:, -1], periods) + self.before[:, rest])
        sources = np.arange(len(self.before)).reshape(-1, *([1] * np.ndim(positions)))
        return whole + (sources == self.pattern[rest]) * inside

    def sources(self, positions: np.ndarray) -> np.ndarray:
        return self.pattern[positions // self.unit % len(self.pattern)]


@dataclass(frozen=True)
class Shape:
    """The cut of the global sequence; recorded with the run, because the order follows from it."""

    batch: int  # G
    lanes: int  # C
    superstep: int  # K
    window: int  # samples, a multiple of the envelope
    unit: int = 1  # consecutive samples of one source; divides a lane's samples of a step

    @property
    def per_lane(self) -> int:
        """Samples of a lane in a step."""
        return self.batch // self.lanes

    @property
    def envelope(self) -> int:
        return self.superstep * self.per_lane


def choose_shape(batch: int, lanes: int, sample_bytes: int, window: int | None = None, one_source: bool = False) -> Shape:
    """Envelopes of about 8 MB and at most 128 steps; windows of about 32 MB, or of at least `window` samples. `one_source`: a
    lane's samples of a step are all of one."""
    per_lane = batch // lanes
    superstep = min(MAX_SUPERSTEP, max(1, ENVELOPE_BYTES // (per_lane * sample_bytes)))
    envelope = superstep * per_lane
    wanted = window or WINDOW_BYTES // sample_bytes
    return Shape(batch, lanes, superstep, envelope * max(1, -(-wanted // envelope)), per_lane if one_source else 1)


@dataclass(frozen=True)
class Section:
    """Steps that are mixed and cut alike. A change of weights, or a source that is used up, starts a new one."""

    first_step: int
    steps: int | None  # a multiple of `superstep`; None: endless
    superstep: int
    begin: int  # position of its first sample
    mixture: Mixture
    base: np.ndarray  # int64 [sources], samples of each source before it


def sections(mix: list[tuple[int, list[float]]], caps: list[int | None], shape: Shape) -> tuple[list[Section], int | None]:
    """The run cut into sections, and the step at which its data runs out (None: never).

    `mix`: (step, weights from there on), ascending; `caps`: the most samples to take of each source. A source is left out
    from the first step that would exceed its cap; the others share its weight. Where a section's steps are no multiple of
    the superstep, the rest is a section of one shorter superstep, so that a change falls exactly on its step.
    """
    out: list[Section] = []
    origin, base = mix[0][0], np.zeros(len(caps), dtype=np.int64)
    most = np.array([np.iinfo(np.int64).max if c is None else c for c in caps])
    ends = [*(step for step, _ in mix[1:]), None]
    for (step, weights), end in zip(mix, ends, strict=True):
        left = list(weights)
        while end is None or step < end:
            if not any(left):
                return out, step
            mixture = Mixture(left, shape.unit)
            steps = _affordable(mixture, most - base, shape.batch)
            over = mixture.counts(((steps or 0) + 1) * shape.batch) > most - base
            if end is not None and (steps is None or steps > end - step):
                steps = end - step
            for part, superstep in _cut(steps, shape.superstep):
                out.append(Section(step, part, superstep, (step - origin) * shape.batch, mixture, base))
                if part is None:
                    return out, None
                base = base + mixture.counts(part * shape.batch)
                step += part
            left = [0.0 if stop else w for w, stop in zip(left, over, strict=True)]
    raise AssertionError("the last section is endless or runs out")


def _affordable(mixture: Mixture, left: np.ndarray, batch: int) -> int | None:
    """Whole steps until the first source would exceed what is left of it; None if none ever does."""
    period, most = mixture.unit * mixture.before[:, -1], np.iinfo(np.int64).max
    limited = (left < most // 2) & (period > 0)
    if not limited.any():
        return None
    low, high = 0, int((left[limited] // period[limited] + 1).min() * mixture.unit * len(mixture.pattern) // batch + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if (mixture.counts(middle * batch) <= left).all() else (low, middle - 1)
    return low


def _cut(steps: int | None, superstep: int) -> list[tuple[int | None, int]]:
    """(steps, superstep) of the sections that `steps` steps are cut into."""
    if steps is None:
        return [(None, superstep)]
    whole, rest = steps // superstep * superstep, steps % superstep
    return [(n, k) for n, k in ((whole, superstep), (rest, rest)) if n]
