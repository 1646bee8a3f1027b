"""Reports steps to the driver: losses, norms, rates, trained tokens of each source, and the numbers of replaced samples and
skipped steps, over all workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import torch
import torch.distributed as dist

from heliostat.cluster.peak_flops import peak_flops
from heliostat.data.conversations import sample_tokens
from heliostat.data.order import Order
from heliostat.engine import sharded_state
from heliostat.recipes.auditing import Audits, ChecksFirstStep
from heliostat.recipes.protocol import Recipe
from heliostat.runs.events import Steps
from heliostat.training.worker.context import Context, Hook
from heliostat.training.worker.micro_batches import StepBatches
from heliostat.training.worker.unsealed import Unsealed, check_budget

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine


class StepResults(NamedTuple):
    """Holds the results of steps over all workers, one value per step: losses, and gradient norms before clipping.

    `added`: values of each part of the objective, by name. `experts`: values of the experts' load, by name. `counts`: sums
    of the counts that the workers passed to `Stepper.report`.
    """

    losses: list[float]
    norms: list[float]
    added: dict[str, list[float]]
    experts: dict[str, list[float]]
    counts: list[int]


class TrainedTokens:
    """Counts this worker's trained tokens of each source since the last report. Reads only tensors on the host, so the device
    isn't waited for. Without a loss mask (`recipes.auditing`), counts nothing."""

    def __init__(self, recipe: Recipe, order: Order, counts: bool) -> None:
        """Prepares the counts. `counts`: false if another worker counts this worker's samples."""
        self.recipe, self.order, self.counts = (recipe if isinstance(recipe, Audits) else None), order, counts
        self._tokens = np.zeros(len(order.splits), dtype=np.int64)

    def add(self, step: int, batches: StepBatches) -> None:
        """Adds this worker's share of a step, counted from 0."""
        if self.recipe and self.counts:
            sources = self.order.sources(self.order.step(step)[list(batches.samples.lanes)])
            tokens = np.concatenate([self.recipe.trained(micro.batch).numpy() for micro in batches.micros])
            np.add.at(self._tokens, sources.ravel(), tokens)

    def take(self) -> list[int]:
        """Returns the trained tokens of each source, and begins to count from zero. Empty without a loss mask, on all workers."""
        taken, self._tokens = self._tokens, np.zeros_like(self._tokens)
        return taken.tolist() if self.recipe else []


class StepsSummary(TypedDict):
    """Summarizes an attempt's steps.

    The rates don't count the first step, because this step also warms up. `data_wait`: the share of the time spent waiting for
    data, 0 to 1.
    """

    train_loss: float | None
    tokens_per_second: float
    data_wait: float


class StepReports:
    """Reports the results of the steps since the last report, and their time.

    `skipped`: steps of the run that changed no weight, because fp16 gradients overflowed.
    """

    def __init__(
        self,
        context: Context,
        engine: DeepSpeedEngine,
        recipe: Recipe,
        unsealed: Unsealed,
        hooks: Sequence[Hook],
        sums: Callable[[dist.ProcessGroup, list[int]], StepResults],
        trained: TrainedTokens,
    ) -> None:
        """Prepares the reports. `sums`: sums the results since the last report over all workers (`step.Stepper.report`).
        `trained`: counts the trained tokens of each source."""
        self.context, self.job, self.ledger, self.engine, self.recipe = context, context.job, context.ledger, engine, recipe
        self.unsealed, self.hooks, self.sums, self.trained = unsealed, hooks, sums, trained
        self.skipped = context.start_step - sharded_state.of(engine).steps
        self._reported, self._since = context.start_step, time.perf_counter()
        self._waited = 0.0  # seconds waited for data, up to the last report
        self._steady_s = self._steady_wait = 0.0
        self._sample_tokens = sample_tokens(unsealed.dataset.sources, context.plan)
        self._reported_peak = False  # whether the unknown peak of this GPU was reported

    def begin(self) -> None:
        """Starts the clock when the first step begins."""
        self._since = time.perf_counter()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Excludes the time inside the context from the steps' seconds."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def report(self, done: int) -> None:
        """Combines the results from all workers of the steps up to `done`, and posts the combined results.

        All workers call this method together.
        """
        now, first = time.perf_counter(), self._reported
        waited = self.ledger.totals().get("data", 0.0)
        seconds, wait = now - self._since, waited - self._waited
        self._waited = waited
        if done > self.context.start_step + 1:  # the first step warms up
            self._steady_s, self._steady_wait = self._steady_s + seconds, self._steady_wait + wait
        self._post(first, done, seconds, wait)
        self._reported, self._since = done, now

    def summary(self, done: int) -> StepsSummary:
        trained = done - self.context.start_step - 1
        return {
            "train_loss": self.context.latest.loss,
            "tokens_per_second": self._per_second(trained, self._steady_s),
            "data_wait": self._steady_wait / self._steady_s if self._steady_s else 0.0,
        }

    def _post(self, first: int, done: int, seconds: float, wait: float) -> None:
        results = self.sums(self.context.control, [self.unsealed.replaced, *self.trained.take()])
        self.context.progressed()  # raises after an abort, before a number is judged or logged
        replaced, *trained = results.counts
        check_budget(replaced, done, self.job, self.unsealed.dataset.order)
        for hook in self.hooks:
            hook.on_report(first, results.losses)
        if first == 0 and isinstance(self.recipe, ChecksFirstStep):
            self.recipe.check_first_step({name: values[0] for name, values in results.added.items()})
        self.context.latest.loss = results.losses[-1]
        skipped, scale = self._fp16(done)
        self.context.posts.tell(
            Steps(
                first=first,
                loss=results.losses,
                added=results.added,
                experts=results.experts,
                grad_norm=results.norms,
                lr=[self.job.train.lr(s) for s in range(first, done)],
                seconds=seconds,
                tokens_per_second=self._per_second(done - first, seconds),
                data_wait=wait / seconds,
                mfu=self._mfu(done - first, seconds),
                bad_samples=replaced,
                skipped_steps=skipped,
                loss_scale=scale,
                trained=[tokens / (done - first) for tokens in trained],
                ledger=self.ledger.totals(),
            )
        )

    def _fp16(self, done: int) -> tuple[int | None, float | None]:
        """Returns the number of steps skipped so far by fp16's loss scaler, and the loss scale. Reports new skips to the user.
        Returns None for both without fp16."""
        if self.job.train.precision != "fp16":
            return None, None
        before, self.skipped = self.skipped, done - sharded_state.of(self.engine).steps
        scale = sharded_state.of(self.engine).loss_scale
        if self.skipped > before:
            what = f"{self.skipped - before} more steps skipped because fp16 gradients overflowed"
            self.context.posts.notice(f"up to step {done}: {what}. The loss scale is {scale:g}")
        return self.skipped, scale

    def _per_second(self, steps: int, seconds: float) -> float:
        return steps * self.job.train.global_batch_size * (self._sample_tokens or 1) / seconds if seconds else 0.0

    def _mfu(self, steps: int, seconds: float) -> float | None:
        device = self.engine.device
        if device.type != "cuda":
            return None
        name, precision = torch.cuda.get_device_name(device), self.job.train.precision
        peak = peak_flops(name, precision)
        if peak is None and precision != "fp32" and not self._reported_peak:
            self._reported_peak = True
            self.context.posts.notice(
                f"train/mfu isn't reported: heliostat doesn't know the peak FLOP/s of {name!r} in {precision}"
            )
        flops = self.recipe.flops_per_sample(self.engine.module)
        return (
            flops * self.job.train.global_batch_size * steps / seconds / (peak * self.context.world) if peak and flops else None
        )
