"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore.

`factor(schedule, step, steps)` is what the peak rate is multiplied by at step 0, 1, ..., steps - 1. Warm-up is linear from
1/warmup to 1. `cosine` and `linear` then fall to `final_ratio` at the last step; `wsd` (warm-up, stable, decay: Hu et al.
2024, MiniCPM, arXiv 2404.06395) stays at 1 and falls linearly over the last `decay_fraction` of the steps.
"""

from __future__ import annotations

import math

from heliostat.config.spec import Schedule


def factor(schedule: Schedule, step: int, steps: int) -> float:
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        start = max(start, steps - round(schedule.decay_fraction * steps))
        if step < start:
            return 1.0
    progress = (step - start) / max(1, steps - 1 - start)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return schedule.final_ratio + (1 - schedule.final_ratio) * shape
