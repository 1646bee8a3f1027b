"""Keeps an exponential moving average (EMA) of the weights. Each rank averages its own slices of the fp32 master weights.

After step t, counted from 1, the average moves toward the weights by 1 - min(decay, (1 + t) / (10 + t)). So the initial weights
lose their influence quickly. Checkpoints contain the average as `ema.<parameter>`, and reshard it like the fp32 master weights.
Exports use the average.

`applied` swaps the average with the weights for an evaluation, and swaps them back afterwards. The average and the weights stay
bitwise the same.
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
        """Updates the averages after step number `step` of the optimizer, counted from 1."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._averages.values()), [s.local for s in self._masters.values()], rate)

    def state(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """Returns views of this rank's slices of the averages, to save with the other training state.

        With `whole`, returns the complete slices, into which a checkpoint can be loaded. Without `whole`, returns only the parts
        of the slices that this rank saves.
        """
        parameters = dict(self.sharded.trained())
        shards = {n: s.holding(self._averages[n]) for n, s in self._masters.items()}
        return {f"{EMA}.{n}": s if whole else self.sharded.share(parameters[n], s) for n, s in shards.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swaps the averages with the weights inside the context. Inside the context, don't save a checkpoint, and don't run an
        optimizer step."""
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
    """Gives access to the average that the optimizer keeps in its state `ema`."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.sharded = sharded_state.of(engine)
        self._masters = self.sharded.slices(MASTER)
        self._averages = {n: s.local for n, s in self.sharded.slices(EMA).items()}

    def update(self, step: int) -> None:
        """Does nothing: the optimizer's step updates the average."""

    def state(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """Returns an empty dict, because `ShardedState.tensors` already includes the averages."""
        return {}


def of(job: Job, engine: DeepSpeedEngine) -> AveragedWeights | None:
    """Makes the job's average of the weights: the optimizer's average, or a separate one. Returns None if the job has no average.
    The optimizer's state must exist."""
    if job.train.optimizer.averages:
        return OptimizerAverage(engine)
    return AveragedWeights(engine, job.train.ema.decay) if job.train.ema else None
