"""Computes 95 % intervals of scores: of shares, of means, and of statistics of samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964  # half of a 95 % interval, in standard errors
HALVES = 20  # random halves per interval


class Estimate(NamedTuple):
    """Contains a score and its 95 % interval. `low` and `high` are None if there are too few samples for an interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def named(self, name: str) -> dict[str, float]:
        """Returns the score as `name`, and the bounds as `name_low` and `name_high`."""
        bounds = {f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.value, **{bound: value for bound, value in bounds.items() if value is not None}}


def wilson(score: float, count: int) -> tuple[float, float]:
    """Computes the 95 % interval of a share of `count` examples (Wilson 1927). This interval is also valid near 0 and 1."""
    share = Z * Z / count
    middle = (score + share / 2) / (1 + share)
    half = Z / (1 + share) * math.sqrt(score * (1 - score) / count + share / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: np.ndarray) -> Estimate:
    """Estimates the share of true values of a bool array, with Wilson's interval."""
    score = float(hits.mean())
    return Estimate(score, *wilson(score, len(hits)))


def mean(values: np.ndarray) -> Estimate:
    """Estimates the mean of independent values, with its interval from the standard error. One value has no interval."""
    score = float(values.mean())
    if len(values) < 2:
        return Estimate(score)
    error = Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(score, score - error, score + error)


def halves(count: int, seed: int, number: int = HALVES) -> np.ndarray:
    """Draws random halves of `count` samples, without replacement: bool [number, count]. The same seed gives the same halves."""
    rng, out = np.random.default_rng(seed), np.zeros((number, count), dtype=bool)
    for row in out:
        row[rng.permutation(count)[: count // 2]] = True
    return out


def of_halves(value: float, of_each: np.ndarray) -> Estimate:
    """Estimates a statistic's interval from the statistic's values on random halves of the samples.

    The standard deviation over halves estimates the standard error of the statistic on all samples (the delete-half jackknife,
    Shao and Wu 1989). Halves contain no sample twice, unlike bootstrap samples, which would bias statistics of pairs.
    """
    error = Z * float(of_each.std(ddof=1))
    return Estimate(value, value - error, value + error)
