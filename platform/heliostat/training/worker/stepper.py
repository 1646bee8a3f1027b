"""Makes a run's steps on one worker: forward and backward passes and the optimizer's step over its share of each global batch.

A step's micro-batches, their random numbers and its learning rate follow from the step alone. Its loss is the sum of all its loss
terms over their number, whatever the micro-batches held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from heliostat.config.spec import Job
from heliostat.data import content
from heliostat.data.stream import StepSamples
from heliostat.engine import deepspeed_engine
from heliostat.engine.ema import AveragedWeights
from heliostat.engine.sample_group import SampleGroup
from heliostat.recipes.protocol import Recipe
from heliostat.runs.time_ledger import Ledger
from heliostat.training.worker.batch_plan import BatchPlan
from heliostat.training.worker.expert_load import ExpertLoad
from heliostat.training.worker.lr_schedule import factor
from heliostat.training.worker.micro_batches import Micro
from heliostat.training.worker.objective import Objective


class StepResults(NamedTuple):
    """Holds what steps gave over all workers, a value a step: losses, gradient norms before clipping, the parts of the objective
    and the experts' load by name; and `replaced`, the samples that were replaced so far in the run."""

    losses: list[float]
    norms: list[float]
    added: dict[str, list[float]]
    experts: dict[str, list[float]]
    replaced: int


class Stepper:
    """Makes steps, and holds what they gave on this worker until it is reported.

    `losses`: this worker's part of each step's loss; `added`: of what is in the objective beside it; `norms`: of all workers'
    gradients, before clipping.
    """

    def __init__(
        self, job: Job, engine: Any, recipe: Recipe, batch_plan: BatchPlan, sharing: SampleGroup, ledger: Ledger,
        average: AveragedWeights | None = None, progressed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Prepares it. `progressed`: is called for every micro-batch that the host has handed to the device."""
        self.job, self.engine, self.recipe, self.average = job, engine, recipe, average
        self.batch_plan, self.sharing, self.ledger = batch_plan, sharing, ledger
        self.objective, self.experts = Objective(recipe, sharing.averaged, progressed), ExpertLoad(recipe, engine)
        self.losses: list[torch.Tensor] = []
        self.added: list[torch.Tensor] = []
        self.norms: list[float] = []
        self._agreed = False

    def step(self, step: int, mine: StepSamples) -> float:
        """Makes a step, counted from 0, and returns the norm of its gradient."""
        engine, train = self.engine, self.job.train
        deepspeed_engine.set_lr(engine, train.optimizer.lr * factor(train.schedule, step, train.steps))
        micros = self._micros(step, mine)
        terms = self._terms(micros)
        total = torch.zeros((), device=engine.device)
        added: torch.Tensor | None = None
        for i, part in enumerate(self.objective.shares(engine, micros, terms)):
            engine.backward(part.objective)
            total += part.loss
            if part.added is not None:
                added = part.added if added is None else added + part.added
            self.experts.add(part.routed)
            if i + 1 == len(micros) and not engine.zero_optimization_stage():
                self.norms.append(deepspeed_engine.gradient_norm(engine, train.grad_clip))
            engine.step()
        if self.average and engine.was_step_applied():
            self.average.update(step + 1)
        if engine.zero_optimization_stage():
            self.norms.append(deepspeed_engine.gradient_norm(engine, train.grad_clip))
        with self.ledger("communicating"):
            self.experts.end_step()
        self.losses.append(self._counted(total / terms))
        if added is not None:
            self.added.append(self._counted(added))
        return self.norms[-1]

    def report(self, group: Any, replaced: int) -> StepResults:
        """Sums over the workers, in one collective, what the steps since the last report gave. `group`: of all workers, on the
        CPU; `replaced`: this worker's part of the number."""
        if not self._agreed:
            self.objective.agree(group)
            self._agreed = True
        names, steps = self.objective.names or [], len(self.losses)
        beside = torch.tensor([replaced], dtype=torch.float32, device=self.engine.device)
        sums = torch.cat([torch.stack(self.losses), *self.added, beside]).double()
        with self.ledger("communicating"):
            dist.all_reduce(sums)
            *values, bad = sums.tolist()
        with self.ledger("communicating"):
            experts = self.experts.report()
        added = {name: values[steps + i :: len(names)] for i, name in enumerate(names)}
        found = StepResults(values[:steps], self.norms, added, experts, int(bad))
        self.losses, self.norms, self.added = [], [], []
        return found

    def _counted(self, values: torch.Tensor) -> torch.Tensor:
        """Returns what this worker adds to a sum over all; zeros, whatever the values, where another of its group adds them."""
        return values if self.sharing.counts else torch.zeros_like(values)

    def _micros(self, step: int, mine: StepSamples) -> list[Micro]:
        """Makes this worker's micro-batches of a step."""
        keys, size = self.batch_plan.keys(step, mine.lanes), self.job.train.micro_batch
        parts = zip(content.split(mine.content, size), content.split(keys, size), strict=True)
        return [
            Micro(
                self.batch_plan.seed(step, mine.lanes, i, self.sharing.part),
                numbers,
                self.sharing.cut(self.recipe, self.recipe.batch(rows, numbers)),
            )
            for i, (rows, numbers) in enumerate(parts)
        ]

    def _terms(self, micros: list[Micro]) -> Any:
        """Counts the loss terms in the global batch."""
        if self.recipe.terms_per_sample:
            return self.recipe.terms_per_sample * self.job.train.global_batch
        count = sum(self.recipe.terms(micro.batch) for micro in micros) * self.sharing.counts
        total = torch.tensor(count, dtype=torch.float32, device=self.engine.device)
        with self.ledger("communicating"):
            dist.all_reduce(total)
        return total
