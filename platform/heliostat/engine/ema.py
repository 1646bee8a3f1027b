"""Averages the weights exponentially (EMA), sharded like the weights: each rank averages the fp32 slices that ZeRO gave it.

After step t (from 1) the average moves towards the weights by 1 - min(decay, (1 + t) / (10 + t)), so that the initial weights
lose their influence quickly. Checkpoints hold it as `ema.<parameter>`, saved and resharded like the masters. `applied` swaps the
average with the weights for an evaluation and back again, bit by bit; exports take the average instead of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from heliostat.checkpoint.layout import EMA
from heliostat.config.spec import Job
from heliostat.engine import sharded_state
from heliostat.engine.sharded_state import MASTER

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class AveragedWeights:
    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        self.sharded, self.decay = sharded_state.of(engine), decay
        self._masters = self.sharded.slices(MASTER)
        self._averages = {n: s.local.detach().clone() for n, s in self._masters.items()}

    def update(self, step: int) -> None:
        """Updates the averages after the optimizer's step number `step`, from 1."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._averages.values()), [s.local for s in self._masters.values()], rate)

    def state(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """Returns this rank's slices of the averages, as views, to be saved next to the other training state."""
        parameters = dict(self.sharded.trained())
        shards = {n: s.holding(self._averages[n]) for n, s in self._masters.items()}
        return {f"{EMA}.{n}": s if whole else self.sharded.share(parameters[n], s) for n, s in shards.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Computes with the averages in the weights' place inside; no checkpoint may be saved, and no step made, meanwhile."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, shard in self._masters.items():
            before = shard.local.clone()
            shard.local.copy_(self._averages[name])
            self._averages[name].copy_(before)
        self.sharded.refresh()


class OptimizerAverage(AveragedWeights):
    """Shows the average of the weights that the optimizer keeps itself, as its state `ema`, to whatever reads averages."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.sharded = sharded_state.of(engine)
        self._masters = self.sharded.slices(MASTER)
        self._averages = {n: s.local for n, s in self.sharded.slices(EMA).items()}

    def update(self, step: int) -> None:
        """Does nothing: the optimizer's step has."""

    def state(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """Returns nothing: `ShardedState.tensors` has the averages."""
        return {}


def of(job: Job, engine: DeepSpeedEngine) -> AveragedWeights | None:
    """Makes the average that a job asks for, of its own or as its optimizer keeps it; the optimizer's state must be made."""
    if job.train.optimizer.averages:
        return OptimizerAverage(engine)
    return AveragedWeights(engine, job.train.ema.decay) if job.train.ema else None
