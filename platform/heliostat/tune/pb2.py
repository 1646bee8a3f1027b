"""Suggests PB2's next hyperparameters: the values with the highest upper confidence bound of a Gaussian process.

The Gaussian process models the metric's gain per step in all intervals of the population (Parker-Holder et al. 2020, arXiv
2002.02518). Ray Tune implements this process, its kernel, and the search for the maximum. The kernel gives old intervals less
weight. The intervals come from the trials' records, so a resumed sweep has the same data. Each value is scaled from its range to
[0, 1], on a logarithmic scale if the range is logarithmic.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from heliostat.tune.space import Domain, Params, Space, fit, number
from heliostat.tune.trial_record import TrialRecord


class Interval(NamedTuple):
    """Describes the interval between two reports of a trial. The hyperparameters are constant in this interval."""

    number: int  # the trial's number
    step: int  # step at the interval's end
    before: float  # metric at the interval's start
    gain: float  # change of the metric per step
    params: Params


def intervals(records: list[TrialRecord]) -> list[Interval]:
    """Lists the intervals of all trials, ordered by their last steps. If a trial was cloned, its next interval starts at the
    donor's last report. The trial's intervals from before the clone don't change."""
    by_number = {r.number: r for r in records}
    return sorted((i for r in records for i in _of(r, by_number)), key=lambda i: i.step)


def _of(record: TrialRecord, by_number: dict[int, TrialRecord]) -> Iterator[Interval]:
    clones = list(record.clones)
    params = clones[0]["old"] if clones else record.params
    since: tuple[int, float] | None = None
    for step, value, at in record.reports:
        while clones and clones[0]["at"] <= at:
            clone = clones.pop(0)
            params = clone["params"]
            donor = [v for s, v, when in by_number[clone["from"]].reports if s == clone["step"] and when <= clone["at"]]
            since = (clone["step"], donor[-1]) if donor else None
        if since and step > since[0]:
            yield Interval(record.number, step, since[1], (value - since[1]) / (step - since[0]), params)
        since = (step, value)


def suggest(
    records: list[TrialRecord], donor: int, step: int, space: Space, mode: str, rng: np.random.Generator
) -> Params | None:
    """Suggests hyperparameters for a trial that clones `donor` at `step`; None if the donor has fewer than two reports.

    Takes into account the trials that have already cloned at this step, so that not all of these trials get the same values.
    """
    from ray.tune.schedulers.pb2 import _select_config

    known, sign = intervals(records), 1.0 if mode == "max" else -1.0
    own = [i for i in known if i.number == donor]
    if not own:
        return None
    points = np.array([[i.step, sign * i.before, *_units(space, i.params)] for i in known])
    gains = np.array([sign * i.gain for i in known])
    cloned = [_units(space, r.params) for r in records if r.clones and r.clones[-1]["step"] == step]
    taken = np.array(cloned) if cloned else None
    here = np.array([own[-1].step, sign * own[-1].before])  # of the last interval: the next one is outside the known range
    drawn = np.random.get_state()  # Tune's search draws its starting points from this global generator
    np.random.seed(int(rng.integers(2**32)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn warns about kernel parameters at their bounds
            units = _select_config(points, gains, taken, here, dict.fromkeys(space, (0.0, 1.0)), 2)  # type: ignore[arg-type]
    finally:
        np.random.set_state(drawn)
    return {key: _value(domain, float(unit)) for (key, domain), unit in zip(space.items(), units, strict=True)}


def _units(space: Space, params: Params) -> list[float]:
    return [_unit(domain, number(params[key])) for key, domain in space.items()]


def _unit(domain: Domain, value: float) -> float:
    low, high, value = (math.log(v) if "log" in domain.kind else v for v in (*domain.numbers[:2], value))
    return (value - low) / (high - low)


def _value(domain: Domain, unit: float) -> float:
    low, high = (math.log(v) if "log" in domain.kind else v for v in domain.numbers[:2])
    value = low + unit * (high - low)
    return fit(domain, math.exp(value) if "log" in domain.kind else value)
