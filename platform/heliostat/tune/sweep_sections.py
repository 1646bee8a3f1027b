"""Defines three sections of the sweep file: budget, searcher, and scheduler."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from heliostat.config.fields import Fraction, Positive, Seed
from heliostat.schema import Float, Strict

MOST = 100_000  # maximum trials of a sweep
Above0 = Annotated[Float, Field(gt=0)]


class SweepBudget(Strict):
    trials: Annotated[int, Field(gt=0, le=MOST)] | None = None
    """Number of trials. With `pbt` and `pb2`, the size of the population."""
    hours: Above0 | None = None
    """Maximum hours of the sweep, summed over all commands that ran it."""
    gpu_hours: Above0 | None = None
    """Maximum GPU-hours (the workers' GPUs times hours) of all trials together. Only for workers with GPUs."""
    tokens: Above0 | None = None
    """Maximum tokens of all trials together, or samples if the job has no tokens. Must suffice for at least one trial."""


class SearcherSection(Strict):
    name: Literal["random", "grid", "optuna"] = "random"
    """Search algorithm, see docs/tuning.md#searchers"""
    seed: Seed = 0
    """Random seed. A trial's values depend on it and on the trial's number."""


class Scheduler(Strict):
    name: Literal["none", "asha", "hyperband", "median", "pbt", "pb2"] = "none"
    """Scheduler of the trials, see docs/tuning.md#schedulers"""
    grace: Positive | None = None
    """asha, hyperband, median: steps before the first decision, a multiple of the job's `evaluate.every`. asha and hyperband
    require it."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """asha, hyperband: one of this many trials continues after each rung."""
    min_trials: Positive = 3
    """median: minimum number of other trials that have reached the same step."""
    interval: Positive | None = None
    """pbt, pb2: steps between two exchanges, a multiple of the job's `evaluate.every`. Required."""
    quantile: Annotated[Float, Field(gt=0, le=0.5)] = 0.25
    """pbt, pb2: share of the trials that clone one of the best trials."""
    resample: Fraction = 0.25
    """pbt: probability that a value is sampled again instead of changed by a fifth."""

    @property
    def halves(self) -> bool:
        return self.name in ("asha", "hyperband")

    @property
    def exchanges(self) -> bool:
        return self.name in ("pbt", "pb2")
