"""Ends an attempt if a loss or a gradient isn't finite, if a step has no trained token, or after a loss spike if the job sets
`spike.action: rollback`.

`config.spikes` defines which losses are spikes. The run then returns to a checkpoint and skips the samples; PaLM's training did
this by hand (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set

from heliostat.config.spikes import SpikeDetector
from heliostat.data.dataset import Dataset
from heliostat.errors import HeliostatError, LossSpikeError, NonFiniteError
from heliostat.runs.events import LossSpike
from heliostat.training.worker.context import Context, Hook

NAMED = 8  # samples that an error message lists


class LossWatch(Hook):
    """Watches the losses and gradient norms of all workers.

    The values are the same on every worker, so every worker raises the same errors.

    `saved`: a function that waits until the save in flight, of an earlier step, is complete. `untrained`: steps without loss
    terms, counted from 0 (`Stepper.untrained`).
    """

    def __init__(
        self, context: Context, dataset: Dataset, saved: Callable[[], object], untrained: Set[int] = frozenset()
    ) -> None:
        self.job, self.posts = context.job, context.posts
        self.dataset, self.saved, self.untrained = dataset, saved, untrained
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
        if self._fails(step, norm):
            self._fail(step, f"gradient norm {norm}")

    def cause(self, norms: list[tuple[int, float]]) -> HeliostatError | None:
        """Returns the error of the first step whose norm isn't finite. Weights after such a step aren't finite, so a recipe may
        raise an error in a later step."""
        return next((self._error(step, f"gradient norm {norm}") for step, norm in norms if self._fails(step, norm)), None)

    def _fails(self, step: int, norm: float) -> bool:
        return step in self.untrained or self._overflows(norm)

    def _overflows(self, norm: float) -> bool:
        return self.job.train.precision != "fp16" and not math.isfinite(norm)

    def _fail(self, step: int, what: str) -> None:
        self.saved()
        raise self._error(step, what)

    def _error(self, step: int, what: str) -> HeliostatError:
        """Creates the error of a step, counted from 0, whose numbers aren't finite. With `spike.action: rollback`, the error is a
        LossSpikeError, unless the step has no loss terms."""
        if step in self.untrained:
            return NonFiniteError(
                f"step {step + 1}: no token of its samples is trained, so the step has no loss. Training stopped before the next "
                f"checkpoint. {self._samples(step)}. Remove rows without trained tokens from the dataset, or raise "
                "train.global_batch_size"
            )
        if self.job.spike and self.job.spike.action == "rollback":
            return LossSpikeError(f"step {step + 1}: {what}", step)
        return NonFiniteError(
            f"step {step + 1}: {what}. Training stopped before the next checkpoint. {self._samples(step)}. Lower "
            "train.optimizer.lr, or look at the data, and use --resume"
        )

    def _samples(self, step: int) -> str:
        """Lists the samples of a step, and their sources if there are several."""
        order, sources = self.dataset.order, self.dataset.sources
        ids = order.locate(order.step(step).ravel())
        names = [f"{s}:{c}:{r}" for s, c, r in zip(ids.source[:NAMED], ids.chunk[:NAMED], ids.row[:NAMED], strict=True)]
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        taken = [f"{s} is {sources[s].location}" for s in sorted({*ids.source.tolist()})] if len(sources) > 1 else []
        return f"Samples (source:chunk:row): {', '.join(names)}{more}{''.join(f'; source {one}' for one in taken)}"
