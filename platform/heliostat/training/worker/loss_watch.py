"""Ends an attempt for a loss or a gradient that is not finite, or for a loss spike that the job wants undone.

A loss spike is a step's loss far above the losses of the steps before it. Robust statistics, so that one spike does not hide the
next: the median and the median absolute deviation of the window, scaled to a normal's standard deviation (Rousseeuw and Croux
1993). Going back and leaving the samples out is what PaLM's training did by hand (Chowdhery et al. 2022, arXiv 2204.02311,
section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

from heliostat.config.sections import Spike
from heliostat.data.dataset import Dataset
from heliostat.errors import LossSpikeError, NonFiniteError
from heliostat.runs.events import LossSpike
from heliostat.training.worker.context import Context, Hook

NAMED = 8  # samples that an error names
NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
FLOOR = 0.01  # of the median: a window of all but equal losses must not make noise a spike


class SpikeDetector:
    """Detects spikes in the losses of successive steps; spikes do not enter the window.

    The same losses give the same results on every worker.
    """

    def __init__(self, policy: Spike) -> None:
        self.policy = policy
        self._window: deque[float] = deque(maxlen=policy.window)

    def spike(self, step: int, loss: float) -> LossSpike | None:
        """Checks the loss of a step, counted from 0; returns the spike if it is one, else None.

        A finite loss can only be a spike once half a window is filled.
        """
        if not math.isfinite(loss):
            return self._spike(step, loss, math.nan, math.inf)
        if len(self._window) >= self.policy.window // 2:
            middle = statistics.median(self._window)
            spread = NORMAL * statistics.median(abs(x - middle) for x in self._window)
            limit = middle + self.policy.threshold * max(spread, FLOOR * abs(middle))
            if loss > limit:
                return self._spike(step, loss, middle, limit)
        self._window.append(loss)
        return None

    def _spike(self, step: int, loss: float, usual: float, limit: float) -> LossSpike:
        return LossSpike(step=step + 1, loss=loss, usual=usual, limit=limit, action=self.policy.action)


class LossWatch(Hook):
    """Watches the losses and gradient norms of all workers; the same ones give the same error on each.

    `saved`: waits for the save in flight, which is of a step before, so that it completes.
    """

    def __init__(self, context: Context, dataset: Dataset, saved: Callable[[], object]) -> None:
        self.job, self.posts = context.job, context.posts
        self.dataset, self.saved = dataset, saved
        self.detector = SpikeDetector(self.job.spike) if self.job.spike else None

    def on_report(self, first: int, losses: list[float]) -> None:
        """Checks the losses of steps; LossSpikeError for a spike to be undone, NonFiniteError for no number."""
        for step, loss in enumerate(losses, first):
            spike = self.detector.spike(step, loss) if self.detector else None
            if not math.isfinite(loss):
                self._fail(step, f"loss {loss}")
            elif spike:
                self.posts.tell(spike)
                if spike.action == "rollback":
                    self._roll_back(step, spike.text)

    def on_norm(self, step: int, norm: float) -> None:
        """Checks a step's gradient norm; fp16's loss scaler skips such steps itself."""
        if self.job.train.precision != "fp16" and not math.isfinite(norm):
            self._fail(step, f"gradient norm {norm}")

    def _roll_back(self, step: int, what: str) -> None:
        self.saved()
        raise LossSpikeError(f"step {step + 1}: {what}", step)

    def _fail(self, step: int, what: str) -> None:
        if self.job.spike and self.job.spike.action == "rollback":
            self._roll_back(step, what)
        order = self.dataset.order
        ids = order.locate(order.step(step).ravel())
        names = [f"{s}:{c}:{r}" for s, c, r in zip(ids.source[:NAMED], ids.chunk[:NAMED], ids.row[:NAMED], strict=True)]
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        self.saved()
        raise NonFiniteError(
            f"step {step + 1}: {what}; training stopped before another checkpoint. Samples (source:chunk:row): "
            f"{', '.join(names)}{more}. Lower train.optimizer.lr, or look at the data, and use --resume"
        )
