"""Carries a learning rate from small models to a big one, after muP: a sweep at some small widths, extrapolated along a line.

G. Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer" (2022, arXiv 2203.03466),
show that with Adam the best learning rate of hidden matrices falls as 1 / width (their table 8), while in the standard
parametrization, which our models have, one rate for all parameters moves with the width by a power that depends on the model. So
the power is measured: from each width's best rate (a parabola through the best three in log lr), a line in log-log. With one
width only, muP's power, -1, is taken. It is an extrapolation: the report says from how far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from heliostat import schema
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.tune.space import number
from heliostat.tune.sweep import SweepPlan
from heliostat.tune.trial_record import TrialRecord
from heliostat.validation.check import load_job

LR, WIDTH = "train.optimizer.lr", "hidden_size"
MUP = -1.0  # Adam, hidden matrices


@dataclass(frozen=True)
class Transfer:
    """Holds a transferred learning rate: `rates` are the best ones by width, `power` is the exponent of the width."""

    rates: dict[int, float]
    power: float
    measured: bool
    width: int
    rate: float


def optimum(points: dict[float, float], mode: str = "min") -> float:
    """Estimates the best learning rate from (rate -> score): the vertex of the parabola through the best and its neighbours in
    log rate; the best itself where it lies at the edge."""
    sign = 1.0 if mode == "min" else -1.0
    rates = sorted(points)
    best = min(range(len(rates)), key=lambda i: sign * points[rates[i]])
    if best in (0, len(rates) - 1):
        return rates[best]
    x = np.log([rates[best - 1], rates[best], rates[best + 1]])
    a, b, _ = np.polyfit(x, [sign * points[rates[best + i]] for i in (-1, 0, 1)], 2)
    vertex = -b / (2 * a) if a > 0 else x[1]
    return float(math.exp(min(x[2], max(x[0], vertex))))


def transfer(rates: dict[int, float], width: int) -> Transfer:
    """Extrapolates the learning rate for a width, along the log-log line through the best rates of other widths."""
    if len(rates) == 1:
        ((known, rate),) = rates.items()
        return Transfer(rates, MUP, False, width, rate * (width / known) ** MUP)
    power, shift = np.polyfit(np.log(list(rates)), np.log(list(rates.values())), 1)
    return Transfer(rates, float(power), True, width, float(math.exp(power * math.log(width) + shift)))


def check(plan: SweepPlan, big: Path) -> Job:
    """Loads the big job; ConfigError if a learning rate cannot be carried to it from this sweep."""
    job = load_job(big)
    if LR not in plan.sweep.space:
        raise ConfigError(f"--transfer: the sweep's space has no {LR}. Add it")
    for name, model in ((str(big), job.model), (plan.sweep.job, _models(plan)[0])):
        if not isinstance(model.get(WIDTH), int):
            raise ConfigError(f"--transfer: model.{WIDTH} of {name}, the width, isn't set. Set it")
    return job


def _models(plan: SweepPlan) -> list[dict[str, Any]]:
    domain = plan.sweep.space.get("model")
    swept = [value for value in domain.values if isinstance(value, dict)] if domain and domain.listed else []
    return swept or [plan.base["model"]]


def carry(plan: SweepPlan, records: list[TrialRecord], big: Job, file: Path) -> tuple[Transfer, Path]:
    """Writes the big job with the rate that the sweep's finished trials give it."""
    scores: dict[int, dict[float, float]] = {}
    for record in records:
        value = record.value
        if record.status == "finished" and value is not None and math.isfinite(value):
            model = plan.job(record.number, record.params).model
            scores.setdefault(model[WIDTH], {})[float(number(record.params[LR]))] = value
    if not scores:
        raise ConfigError("--transfer: no trial of the sweep has finished. Finish the sweep first")
    carried = transfer({w: optimum(points, plan.sweep.mode) for w, points in sorted(scores.items())}, big.model[WIDTH])
    written = schema.read_yaml(file)
    raw = schema.apply(written, [f"{LR}={carried.rate!r}"])
    if "lr" not in (written["train"].get("optimizer") or {}):  # by rule, with a warm-up that a job with its own rate lacks
        raw["train"]["schedule"] = big.train.schedule.model_dump()
    path = file.with_name(f"{file.stem}-transferred.yaml")
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return carried, path


def tell(carried: Transfer) -> list[str]:
    """Describes the transfer in lines for people."""
    lines = [f"width {width:>6,}: best lr {rate:.3g}" for width, rate in carried.rates.items()]
    how = "measured" if carried.measured else "muP's rule, because there is only one width"
    far = carried.width / max(carried.rates)
    return [
        *lines,
        f"lr ~ width^{carried.power:.2f} ({how}); at width {carried.width:,}, {far:.1f} times the widest: lr {carried.rate:.3g}",
    ]
