"""Defines the section `spike` of the job file, and detects loss spikes.

A loss spike is a step's loss far above the losses of the steps before it. The detector uses robust statistics, so one spike
doesn't hide the next spike. These statistics are the median of the window, and its median absolute deviation, scaled to the
standard deviation of a normal distribution (Rousseeuw and Croux 1993).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from heliostat.schema import Float, Strict

NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
FLOOR = 0.01  # minimum deviation as a fraction of the median, so that noise in nearly equal losses isn't a spike


class Spike(Strict):
    window: Annotated[int, Field(ge=4)] = 50
    """Number of recent steps that define the usual loss."""
    threshold: Annotated[Float, Field(gt=0)] = 8.0
    """Minimum distance of a spike from the median of the recent losses, in robust standard deviations."""
    action: Literal["warn", "rollback"] = "warn"
    """`warn`: log the spike and continue. `rollback`: resume from the checkpoint before the spike, and skip the samples of the
    spike's step."""


class Excess(NamedTuple):
    """Describes a spike: the usual loss (the median), the limit that the loss exceeds, and the job's action."""

    usual: float
    limit: float
    action: Literal["warn", "rollback"]


class SpikeDetector:
    """Detects spikes in the losses of successive steps. The window doesn't include spikes.

    The same losses give the same results on every worker.
    """

    def __init__(self, policy: Spike) -> None:
        self.policy = policy
        self._window: deque[float] = deque(maxlen=policy.window)

    def excess(self, loss: float) -> Excess | None:
        """Checks the loss of the next step. Returns None if the loss isn't a spike.

        A finite loss can be a spike only when the window is at least half full.
        """
        if not math.isfinite(loss):
            return Excess(math.nan, math.inf, self.policy.action)
        if len(self._window) >= self.policy.window // 2:
            middle = statistics.median(self._window)
            spread = NORMAL * statistics.median(abs(x - middle) for x in self._window)
            limit = middle + self.policy.threshold * max(spread, FLOOR * abs(middle))
            if loss > limit:
                return Excess(middle, limit, self.policy.action)
        self._window.append(loss)
        return None
