"""Ends an attempt if a loss or a gradient isn't finite, or after a loss spike if the job sets `spike.action: rollback`.

`config.spikes` defines which losses are spikes. The run then returns to a checkpoint and skips the samples; PaLM's training did
this by hand (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from heliostat.config.spikes import SpikeDetector
from heliostat.data.dataset import Dataset
from heliostat.errors import HeliostatError, LossSpikeError, NonFiniteError
from heliostat.runs.events import LossSpike
from heliostat.training.worker.context import Context, Hook

NAMED = 8  # samples that an error message lists


class LossWatch(Hook):
    """Watches the losses and gradient norms of all workers.

    The values are the same on every worker, so every worker raises the same errors.

    `saved`: a function that waits until the save in flight, of an earlier step, is complete.
    """

    def __init__(self, context: Context, dataset: Dataset, saved: Callable[[], object]) -> None:
        self.job, self.posts = context.job, context.posts
        self.dataset, self.saved = dataset, saved
        self.detector = SpikeDetector(self.job.spike) if self.job.spike else None

    def on_report(self, first: int, losses: list[float]) -> None:
        """Checks the losses of steps.

        Raises LossSpikeError for a loss spike if the job sets `spike.action: rollback`, and NonFiniteError for a non-finite loss.
        """
        for step, loss in enumerate(losses, first):
            excess = self.detector.excess(loss) if self.detector else None
            if not math.isfinite(loss):
                self._fail(step, f"loss {loss}")
            elif excess:
                spike = LossSpike(step=step + 1, loss=loss, **excess._asdict())
                self.posts.tell(spike)
                if spike.action == "rollback":
                    self.saved()
                    raise LossSpikeError(f"step {step + 1}: {spike.text}", step)

    def on_norm(self, step: int, norm: float) -> None:
        """Checks a step's gradient norm. fp16's loss scaler skips steps with infinite norms itself."""
        if self._overflows(norm):
            self._fail(step, f"gradient norm {norm}")

    def cause(self, norms: list[tuple[int, float]]) -> HeliostatError | None:
        """Returns the error of the first step whose norm isn't finite. Weights after such a step aren't finite, so a recipe may
        raise an error in a later step."""
        return next((self._error(step, f"gradient norm {norm}") for step, norm in norms if self._overflows(norm)), None)

    def _overflows(self, norm: float) -> bool:
        return self.job.train.precision != "fp16" and not math.isfinite(norm)

    def _fail(self, step: int, what: str) -> None:
        self.saved()
        raise self._error(step, what)

    def _error(self, step: int, what: str) -> HeliostatError:
        """Creates the error of a step, counted from 0, whose numbers aren't finite. With `spike.action: rollback`, the error is a
        LossSpikeError."""
        if self.job.spike and self.job.spike.action == "rollback":
            return LossSpikeError(f"step {step + 1}: {what}", step)
        order = self.dataset.order
        ids = order.locate(order.step(step).ravel())
        names = [f"{s}:{c}:{r}" for s, c, r in zip(ids.source[:NAMED], ids.chunk[:NAMED], ids.row[:NAMED], strict=True)]
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        return NonFiniteError(
            f"step {step + 1}: {what}. Training stopped before the next checkpoint. Samples (source:chunk:row): "
            f"{', '.join(names)}{more}. Lower train.optimizer.lr, or look at the data, and use --resume"
        )
