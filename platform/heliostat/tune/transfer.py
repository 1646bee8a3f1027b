"""Extrapolates a learning rate to a large model, from a sweep over the widths of small models.

G. Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer" (2022, arXiv 2203.03466),
show that with Adam the best learning rate of hidden matrices falls as 1 / width (table 8). heliostat's models have the standard
parametrization, with one rate for all parameters. In this case the best rate is a power of the width, and the exponent depends on
the model.

So heliostat measures the exponent. For each width, a parabola through three rates (in log lr) gives the best rate. A line through
these best rates, in log-log, gives the exponent. With only one width, the exponent is -1, as in muP. The report shows how far the
extrapolation goes.
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
MUP = -1.0  # muP's exponent of the width, for hidden matrices with Adam


@dataclass(frozen=True)
class Transfer:
    """Holds the learning rate `rate` for `width`. `rates`: the best rate by width; `power`: the exponent of the width;
    `measured`: whether the exponent was measured."""

    rates: dict[int, float]
    power: float
    measured: bool
    width: int
    rate: float


def optimum(points: dict[float, float], mode: str = "min") -> float:
    """Estimates the best learning rate from the score of each rate. The estimate is the vertex of a parabola (in log rate)
    through the best of these rates and its two neighbors. If the best rate is the lowest or the highest, returns this rate."""
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
    """Extrapolates the learning rate for a width along a log-log line through the best rates of the widths. With only one width,
    uses muP's exponent."""
    if len(rates) == 1:
        ((known, rate),) = rates.items()
        return Transfer(rates, MUP, False, width, rate * (width / known) ** MUP)
    power, shift = np.polyfit(np.log(list(rates)), np.log(list(rates.values())), 1)
    return Transfer(rates, float(power), True, width, float(math.exp(power * math.log(width) + shift)))


def check(plan: SweepPlan, big: Path) -> Job:
    """Loads the big job; Raises ConfigError if the job can't get a learning rate from this sweep."""
    job = load_job(big)
    if LR not in plan.sweep.space:
        raise ConfigError(f"--transfer: the sweep's space has no {LR}. Add this key to the space")
    for name, model in ((str(big), job.model), (plan.sweep.job, _models(plan)[0])):
        if not isinstance(model.get(WIDTH), int):
            raise ConfigError(f"--transfer: {name} doesn't set model.{WIDTH}, which is the width of the model. Set this key")
    return job


def _models(plan: SweepPlan) -> list[dict[str, Any]]:
    domain = plan.sweep.space.get("model")
    swept = [value for value in domain.values if isinstance(value, dict)] if domain and domain.listed else []
    return swept or [plan.base["model"]]


def carry(plan: SweepPlan, records: list[TrialRecord], big: Job, file: Path) -> tuple[Transfer, Path]:
    """Writes the big job, with the extrapolated learning rate, to `STEM-transferred.yaml` in the folder of `file`.

    Returns the transfer and the path of the new file. ConfigError if no trial has finished.
    """
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
    if "lr" not in (written["train"].get("optimizer") or {}):  # a rate by rule has a warm-up, a job with its own rate has none
        raw["train"]["schedule"] = big.train.schedule.model_dump()
    path = file.with_name(f"{file.stem}-transferred.yaml")
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return carried, path


def tell(carried: Transfer) -> list[str]:
    """Formats the best learning rate of each width, and the extrapolated learning rate, as lines of text."""
    lines = [f"width {width:>6,}: best lr {rate:.3g}" for width, rate in carried.rates.items()]
    how = "measured" if carried.measured else "muP's exponent, because there is only one width"
    far = carried.width / max(carried.rates)
    return [
        *lines,
        f"lr ~ width^{carried.power:.2f} ({how}); at width {carried.width:,}, {far:.1f} times the sweep's largest width: "
        f"lr {carried.rate:.3g}",
    ]
