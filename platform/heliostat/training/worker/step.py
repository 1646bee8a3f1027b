"""Trains on a worker: one complete step, from its samples to its report, and the loop over the steps.

A step follows from its number alone: its samples, its micro-batches (`micro_batches`), and its learning rate. So a resumed run
needs only the checkpoint. With the default virtual ranks (one per micro-batch), any number of workers computes the same
micro-batches. A step's loss is the sum of its loss terms, divided by the number of these terms (`objective`). Hooks do all other
work around the steps (`context`). The workers agree at every step whether to stop after this step (`heartbeat`).

The host never waits for the device between two steps. A thread makes the next step's batches (`BatchesAhead`). The norm of a
step's gradient is read after the next step is queued, or before anything that depends on the step: a report, an evaluation, a
save. So the host is at most one step ahead of the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import ray
import torch
import torch.distributed as dist

from heliostat.config.spec import Job
from heliostat.data import content, device_ranges
from heliostat.data.device_streams import LateRead, pinned, upload
from heliostat.data.stream import StepSamples
from heliostat.engine import deepspeed_engine
from heliostat.engine.ema import AveragedWeights
from heliostat.engine.sample_group import SampleGroup
from heliostat.errors import HeliostatError
from heliostat.recipes.protocol import Recipe
from heliostat.runs.events import Paused
from heliostat.runs.time_ledger import Ledger
from heliostat.training.stops import FAILED, RESIZE, RUN
from heliostat.training.worker.context import Context, Due, Hook
from heliostat.training.worker.coupled import Terms
from heliostat.training.worker.heartbeat import Heartbeat, StopConsensus
from heliostat.training.worker.micro_batches import BatchesAhead, BatchPlan, Micro, StepBatches
from heliostat.training.worker.objective import ExpertLoad, Objective, late_norm
from heliostat.training.worker.step_reports import StepReports, StepResults
from heliostat.training.worker.unsealed import Unsealed

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine

HELD_POLL_S = 0.05


class Stepper:
    """Computes steps over this worker's share of each global batch, and keeps their results until the report.

    `losses`: this worker's part of each step's loss. `added`: its part of the other terms of the objective.
    """

    def __init__(
        self,
        job: Job,
        engine: DeepSpeedEngine,
        recipe: Recipe,
        batch_plan: BatchPlan,
        sharing: SampleGroup,
        ledger: Ledger,
        average: AveragedWeights | None = None,
        progressed: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares the steps. `progressed`: called for every micro-batch that the host has handed to the device."""
        self.job, self.engine, self.recipe, self.average = job, engine, recipe, average
        self.batch_plan, self.sharing, self.ledger = batch_plan, sharing, ledger
        self.objective, self.experts = Objective(recipe, sharing.averaged, progressed), ExpertLoad(recipe, engine)
        self.losses, self.added = list[torch.Tensor](), list[torch.Tensor]()
        self._norms: list[float] = []
        self._unread: deque[tuple[int, LateRead]] = deque()  # by step: the values of `late_norm`, on their way to the host
        self.untrained: set[int] = set()  # steps, counted from 0, without loss terms; known once their norms are read
        self._agreed = False

    @property
    def norms(self) -> list[float]:
        """Returns the gradient norm of each step since the last report.

        The norms are over all workers, and before clipping. Waits for the device.
        """
        self.read_norms()
        return self._norms

    def read_norms(self, but: int = 0) -> list[tuple[int, float]]:
        """Waits for the unread norms, except for the last `but` steps. Returns (step, norm) pairs."""
        steps = [self._unread.popleft() for _ in range(len(self._unread) - but)]
        read = [(step, *values.values().flatten().tolist()) for step, values in steps]
        self.untrained |= {step for step, _, *terms in read if 0.0 in terms}
        self._norms += [norm for _, norm, *_ in read]
        return [(step, norm) for step, norm, *_ in read]

    def prepare(self, step: int, mine: StepSamples) -> StepBatches:
        """Makes this worker's batches of a step, counted from 0, from its samples. Any thread may call this method."""
        keys, size, device = self.batch_plan.keys(step, mine.lanes), self.job.train.micro_batch_size, self.engine.device
        micros, terms = list[Micro](), 0
        for rows, numbers in zip(content.split(mine.content, size), content.split(keys, size), strict=True):
            seed = self.batch_plan.seed(step, mine.lanes, len(micros), self.sharing.part)
            batch = self.sharing.cut(self.recipe, self.recipe.batch(rows, numbers))
            if not self.recipe.terms_per_sample:
                terms += self.recipe.terms(batch) * self.sharing.counts
            micros.append(Micro(seed, numbers, {name: pinned(values, device) for name, values in batch.items()}))
        return StepBatches(mine, micros, pinned(torch.tensor(terms, dtype=torch.float32), device))

    def step(self, step: int, batches: StepBatches) -> None:
        """Computes a step, counted from 0. Doesn't wait for the device."""
        engine, train, micros = self.engine, self.job.train, batches.micros
        deepspeed_engine.set_lr(engine, train.lr(step))
        terms = self._terms(batches)
        total = torch.zeros((), device=engine.device)
        added: torch.Tensor | None = None
        for i, share in enumerate(self.objective.shares(engine, micros, terms)):
            with device_ranges.named("backward"):
                engine.backward(share.objective)
            total += share.loss
            if share.added is not None:
                added = share.added if added is None else added + share.added
            self.experts.add(share.routed)
            last = i + 1 == len(micros)
            if last and not engine.zero_optimization_stage():
                self._unread.append((step, late_norm(engine, train.grad_clip, terms)))
            with device_ranges.named("optimizer") if last else nullcontext():
                engine.step()
        if self.average and engine.was_step_applied():
            self.average.update(step + 1)
        if engine.zero_optimization_stage():
            self._unread.append((step, late_norm(engine, train.grad_clip, terms)))
        with self.ledger("communicating"):
            self.experts.end_step()
        self.losses.append(self._counted(total / terms))
        if added is not None:
            self.added.append(self._counted(added))

    def _terms(self, batches: StepBatches) -> Terms:
        """Counts the loss terms in the global batch."""
        if self.recipe.terms_per_sample:
            return self.recipe.terms_per_sample * self.job.train.global_batch_size
        total = batches.terms.to(self.engine.device, non_blocking=True, copy=True)
        with self.ledger("communicating"):
            dist.all_reduce(total)
        return total

    def _counted(self, values: torch.Tensor) -> torch.Tensor:
        """Returns this worker's contribution to a sum over all workers: zeros if another worker of its group contributes the
        values."""
        return values if self.sharing.counts else torch.zeros_like(values)

    def report(self, group: dist.ProcessGroup, counts: list[int]) -> StepResults:
        """Sums the results of the steps since the last report over all workers, which call this method together.

        `group`: a CPU group of all workers. `counts`: other numbers of this worker to sum; every worker has equally many.
        """
        if not self._agreed:
            self.objective.agree(group)
            self._agreed = True
        names, steps = self.objective.names or [], len(self.losses)
        last = upload(torch.tensor(counts, dtype=torch.float64), self.engine.device)
        sums = torch.cat([torch.stack(self.losses), *self.added, last]).double()
        with self.ledger("communicating"):
            dist.all_reduce(sums)
            values = sums.tolist()
            experts = self.experts.report()
        added = {name: values[steps + i : -len(counts) : len(names)] for i, name in enumerate(names)}
        results = StepResults(values[:steps], self.norms, added, experts, [int(count) for count in values[-len(counts) :]])
        self.losses, self._norms, self.added = [], [], []
        return results


class Loop:
    """Runs the steps of an attempt, and calls the hooks around them."""

    def __init__(
        self,
        context: Context,
        stepper: Stepper,
        unsealed: Unsealed,
        reports: StepReports,
        heartbeat: Heartbeat,
        hooks: Sequence[Hook],
        pauses: Sequence[int],
        ahead: BatchesAhead,
    ) -> None:
        """Prepares the loop. `pauses`: steps after which the workers wait for a decision. `ahead`: makes the batches."""
        self.context, self.job, self.ledger, self.stepper = context, context.job, context.ledger, stepper
        self.unsealed, self.reports, self.heartbeat = unsealed, reports, heartbeat
        self.hooks, self.pauses, self.ahead = hooks, pauses, ahead
        self.consensus = StopConsensus(context.control)

    def run(self) -> tuple[int, int]:
        """Trains to the last step, or until the workers stop. Returns the number of completed steps, and the stop code."""
        done, stop = self.context.start_step, RUN
        while done < self.job.last_step and stop == RUN:
            stop = self._make(done)
            done += 1
            stop = self._follow(done, stop)
        return done, stop

    def _make(self, step: int) -> int:
        """Computes a step, counted from 0. Returns the stop code on which the workers agree during the step."""
        first = step == self.context.start_step
        with self.ledger("starting" if first else "data"), device_ranges.named("batch"):
            batches = self.ahead.take(step)
        if first:
            self.ledger.switch("compiling" if self.job.train.compile else "computing")
            self.context.phase("step")
            self.reports.begin()
        if any(hook.looks(step) for hook in self.hooks):
            self._judge(but=0)
        for hook in self.hooks:
            hook.before_step(step)
        if step + 1 < self.job.last_step:
            self.ahead.begin(step + 1)
        blocked = sum(hook.blocked_s for hook in self.hooks)
        self.consensus.ask(FAILED if any(hook.unsettled for hook in self.hooks) else self.heartbeat.stop)
        self.heartbeat.step, self.heartbeat.micro = step + 1, 0
        try:
            self.stepper.step(step, batches)
        except Exception as error:
            if cause := self._cause():
                raise cause from error
            raise
        self.context.progressed()  # raises after an abort, before the step counts
        self.unsealed.add(step, batches.samples)
        self.reports.trained.add(step, batches)
        stop = self._agreed(step)
        self.ledger.move("computing", "checkpoint", sum(hook.blocked_s for hook in self.hooks) - blocked)
        if self.job.train.compile and step <= self.context.start_step + 1:
            self.ledger.compiled(first=first)
        if first:
            self.context.phase("stepped")
        return stop

    def _agreed(self, step: int) -> int:
        """Returns the stop code on which the workers agree. The code takes effect after this step."""
        stop = self.consensus.result()
        if stop == FAILED:
            for hook in self.hooks:
                hook.settle()  # raises on every worker, or on none
            return RUN
        if stop == RESIZE and not self.job.checkpoint.due(step + 1):
            return RUN  # a resize waits for the next checkpoint
        return stop

    def _due(self, done: int, stop: int) -> Due:
        job, last = self.job, done == self.job.last_step
        holds = done in self.pauses and not last
        saves = last or stop != RUN or holds or job.checkpoint.due(done)
        keeps = any(hook.copies for hook in self.hooks) and not last and (saves or job.checkpoint.copy_due(done))
        evaluates = job.evaluate is not None and (last or job.evaluate.due(done))
        # also before a save, so that a run that resumes from it has reported every step's loss
        reports = job.train.log_due(done) or saves or keeps or done == self.context.start_step + 1
        return Due(last, reports, evaluates, saves, keeps, holds and stop == RUN)

    def _judge(self, but: int) -> None:
        """Passes the unread gradient norms, except those of the last `but` steps, to the hooks."""
        if norms := self.stepper.read_norms(but):
            self.context.progressed()  # raises after an abort, before the norms are judged
        for step, norm in norms:
            for hook in self.hooks:
                hook.on_norm(step, norm)

    def _cause(self) -> HeliostatError | None:
        """Returns the error of an earlier step that may have caused this step's error, such as NaN weights."""
        try:
            norms = self.stepper.read_norms()
            self.context.progressed()  # raises after an abort, when the norms don't count
        except Exception:  # noqa: BLE001 (the step's own error is raised)
            return None
        return next(filter(None, (hook.cause(norms) for hook in self.hooks)), None)

    def _follow(self, done: int, stop: int) -> int:
        """Does the work that is due after a step. Returns the stop code, which a decision at a pause point may change."""
        due = self._due(done, stop)
        self._judge(but=0 if due.reports or due.evaluates else 1)
        if due.evaluates:
            self.ahead.settle()  # an evaluation calls the recipe's `batch`, too
        for hook in self.hooks:
            hook.after_step(done, due)
        if due.reports:
            self.reports.report(done)
        with self.reports.aside():
            for hook in self.hooks:
                hook.on_save(done, due)
            return self._hold(done) if due.holds else stop

    def _hold(self, done: int) -> int:
        """Waits at a pause point for the driver's decision, after a complete checkpoint. Returns RUN or a stop code, the same on
        every worker."""
        mailbox, latest = self.context.posts.mailbox, self.context.latest
        assert mailbox
        with self.ledger("idle"):
            self.context.posts.post(Paused(step=done, scores=latest.scores, ledger=self.ledger.totals()))
            while True:
                if (decision := ray.get(mailbox.decision(done))) is not None:
                    return decision
                self.context.progressed()  # so that the watchdog doesn't report a stall
                time.sleep(HELD_POLL_S)
