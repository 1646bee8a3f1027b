"""Computes the learning rate as a pure function of the step, so there is no state to save or restore.

The shapes are in `heliostat.config.schedules`.
"""

from __future__ import annotations

from heliostat.config.schedules import REGISTRY, Schedule


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """Computes the factor of the peak learning rate at step 0, 1, ..., steps - 1. Warm-up is linear from 1/warmup to 1."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    return REGISTRY[schedule.name](schedule, step, steps)
