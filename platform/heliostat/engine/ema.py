"""Keeps averages of the weights. Each rank averages its own slices of the fp32 master weights.

- Exponential moving average (EMA): after step t, counted from 1, the average moves toward the weights by 1 - min(decay, (1 + t) /
  (10 + t)). So the initial weights lose their influence quickly.
- Power-function averages (`train.ema.lengths`): see `optim.power_averages`.

Checkpoints contain an average as `<kind>.<parameter>`, for example `ema.<parameter>`, and reshard it like the fp32 master
weights. Exports and evaluations use the first average.

`applied` swaps this average with the weights for an evaluation, and swaps them back afterwards. The average and the weights stay
bitwise the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from heliostat.config.averages import EMA, Ema
from heliostat.config.spec import Job
from heliostat.engine import sharded_state
from heliostat.engine.sharded_state import MASTER
from heliostat.optim import power_averages

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class AveragedWeights:
    def __init__(self, engine: DeepSpeedEngine, settings: Ema) -> None:
        self.sharded, self.decay = sharded_state.of(engine), settings.decay
        self._exponents = {kind: power_averages.exponent(length) for kind, length in settings.by_length.items()}
        self._masters = self.sharded.slices(MASTER)
        self._all = {kind: {n: s.local.detach().clone() for n, s in self._masters.items()} for kind in settings.kinds}
        self._averages = next(iter(self._all.values()))  # the average that evaluations use

    def update(self, step: int) -> None:
        """Updates the averages after step number `step` of the run, counted from 1. Power-function averages count only steps that
        the optimizer has made."""
        masters = [s.local for s in self._masters.values()]
        for kind, average in self._all.items():
            if kind in self._exponents:
                rate = power_averages.rate(self._exponents[kind], self.sharded.steps)
            else:
                assert self.decay is not None
                rate = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), masters, rate)

    def state(self, whole: bool = False) -> dict[str, torch.Tensor]:
        """Returns views of this rank's slices of the averages, to save with the other training state.

        With `whole`, returns the complete slices, into which a checkpoint can be loaded. Without `whole`, returns only the parts
        of the slices that this rank saves.
        """
        parameters = dict(self.sharded.trained())
        shards = {(kind, n): s.holding(of[n]) for kind, of in self._all.items() for n, s in self._masters.items()}
        return {f"{kind}.{n}": s if whole else self.sharded.share(parameters[n], s) for (kind, n), s in shards.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swaps the first average with the weights inside the context. There, don't save a checkpoint, and don't run an optimizer
        step."""
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
    """Makes the job's averages of the weights: the optimizer's average, or separate ones. Returns None if the job has no average.
    The optimizer's state must exist."""
    if job.train.optimizer.averages:
        return OptimizerAverage(engine)
    return AveragedWeights(engine, job.train.ema) if job.train.ema else None
