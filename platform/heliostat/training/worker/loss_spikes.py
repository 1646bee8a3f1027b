"""Detects loss spikes: a step's loss far above the losses of the steps before it.

Robust statistics, so that one spike does not hide the next: the median and the median absolute deviation of the window, scaled to
a normal's standard deviation (Rousseeuw and Croux 1993). Going back and leaving the samples out is what PaLM's training did by
hand (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import NamedTuple

from heliostat.config.sections import Spike

NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
FLOOR = 0.01  # of the median: a window of all but equal losses must not make noise a spike


class FoundSpike(NamedTuple):
    """Describes a loss spike: the step's loss, the window's median, and the limit that the loss exceeds."""

    loss: float
    usual: float
    limit: float

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return f"loss {self.loss}"
        return f"loss {self.loss:.4g}, where {self.usual:.4g} is usual and {self.limit:.4g} the limit"


class Detector:
    """Detects spikes in the losses of successive steps; spikes do not enter the window.

    The same losses give the same results on every worker.
    """

    def __init__(self, policy: Spike) -> None:
        self.policy = policy
        self._window: deque[float] = deque(maxlen=policy.window)

    def spikes(self, loss: float) -> FoundSpike | None:
        """Checks a step's loss; returns the spike if it is one, else None.

        A finite loss can only be a spike once half a window is filled.
        """
        if not math.isfinite(loss):
            return FoundSpike(loss, math.nan, math.inf)
        if len(self._window) >= self.policy.window // 2:
            middle = statistics.median(self._window)
            spread = NORMAL * statistics.median(abs(x - middle) for x in self._window)
            limit = middle + self.policy.threshold * max(spread, FLOOR * abs(middle))
            if loss > limit:
                return FoundSpike(loss, middle, limit)
        self._window.append(loss)
        return None
