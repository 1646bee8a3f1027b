"""Defines the learning-rate schedules of `train.schedule.name`. A schedule is a function that computes the factor after the
warm-up.

All schedules share the keys of `Schedule`. Each function's docstring lists the keys that it uses. docs/guides/schedule.md shows
how to add a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from heliostat.config.fields import Fraction
from heliostat.schema import Strict


def cosine(schedule: Schedule, step: int, steps: int) -> float:
    """Returns a factor that falls from 1 to `final_ratio` along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    return _down_to(schedule.final_ratio, 0.5 * (1 + math.cos(math.pi * _progress(schedule.warmup_steps, step, steps))))


def constant(schedule: Schedule, step: int, steps: int) -> float:
    """Returns 1 at every step, so the rate stays at the peak."""
    return 1.0


def linear(schedule: Schedule, step: int, steps: int) -> float:
    """Returns a factor that falls from 1 to `final_ratio` in a straight line."""
    return _down_to(schedule.final_ratio, 1 - _progress(schedule.warmup_steps, step, steps))


def wsd(schedule: Schedule, step: int, steps: int) -> float:
    """Returns a factor that stays 1, then falls linearly to `final_ratio` over the last `decay_fraction` of the steps. The name
    stands for warm-up, stable, decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395)."""
    start = max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))
    return 1.0 if step < start else _down_to(schedule.final_ratio, 1 - _progress(start, step, steps))


def _progress(start: int, step: int, steps: int) -> float:
    """Computes the progress of a step: 0 at `start`, 1 at the last step."""
    return (step - start) / max(1, steps - 1 - start)


def _down_to(final: float, shape: float) -> float:
    return final + (1 - final) * shape


REGISTRY: dict[str, Callable[[Schedule, int, int], float]] = {f.__name__: f for f in (cosine, constant, linear, wsd)}

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(REGISTRY)]


class Schedule(Strict):
    name: Name = "cosine"
    """Decay of the learning rate after the warm-up. `wsd`: constant, then linear over the last `decay_fraction` of the steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the linear warm-up. Below `train.steps`."""
    final_ratio: Fraction = 0.1
    """Final learning rate, as a fraction of the peak. Not used with `constant`."""
    decay_fraction: Fraction = 0.2
    """Fraction of the steps in which `wsd` decays. Other schedules ignore it."""


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """Computes the learning rate of step 0, 1, ..., steps - 1 as a factor of the peak. Warm-up is linear from 1/warmup to 1."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    return REGISTRY[schedule.name](schedule, step, steps)
