"""Cuts a run's global sequence into sections, windows and blocks, with pure functions.

Sources are interleaved by weight (`Mixture`). Weights may change at given steps (a curriculum), and a source may be used up
(`max_epochs`): `sections` cuts the run there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heliostat.data.mixture import Mixture
from heliostat.errors import DataError

BLOCK_BYTES = 8 << 20  # Ray Data costs 10-20 ms a block whatever its size, so blocks are megabytes
WINDOW_BYTES = 32 << 20
MAX_STEPS_PER_BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """Describes how the global sequence is cut; recorded with the run, because the order follows from it."""

    batch: int  # G
    lanes: int  # C
    steps_per_block: int  # K
    window: int  # samples, a multiple of the block
    unit: int = 1  # consecutive samples of one source; divides a lane's samples of a step

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
    often the weights change. Without `carry` each section begins anew: so it was in version 1 of the data plan.
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
                    f"data.sources: behind step {step} version 1 of the data plan takes more of a source than max_epochs allows "
                    "and cannot go on; train under another name, which plans the data anew"
                )
            left = [0.0 if stop else w for w, stop in zip(left, over, strict=True)]
    raise AssertionError("the last section is endless or runs out")


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
