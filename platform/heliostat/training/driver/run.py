"""Carries a run out from the driver: starts and restarts the workers, and updates the ledger, MLflow and the terminal.

`heliostat.training.run` claims and plans it first. `states` names what a run is at; docs/reliability.md describes what happens
when something fails.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from heliostat.checkpoint import layout
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.data.dataset import make_order
from heliostat.errors import (
    AccessError,
    CorruptionError,
    HeliostatError,
    LeaseError,
    LimitError,
    LossSpikeError,
    StoppedError,
    StorageError,
)
from heliostat.runs import liveness, segments
from heliostat.runs import summary as endings
from heliostat.runs.events import AttemptStarted, BadNodes, Corruption, Event, Goodput, NodeSample, Saved, Steps
from heliostat.runs.time_ledger import LedgerRecorder
from heliostat.storage import run_folder as paths
from heliostat.storage.lease import Lease
from heliostat.terminal import console
from heliostat.tracking.logger import RunOwner
from heliostat.training.driver import suspects
from heliostat.training.driver.finalize import Beside, WarmUp, finalize, unit
from heliostat.training.driver.limits import Spending
from heliostat.training.driver.recovery import Budget, choose, classify
from heliostat.training.driver.signals import Signals
from heliostat.training.driver.states import RunState, States
from heliostat.training.stops import INTERRUPTED, RUN, STOPS, PausePoints
from heliostat.validation.check import Checked

if TYPE_CHECKING:  # Ray takes a second
    from heliostat.training.driver.memory import Memory
    from heliostat.training.driver.pool import WorkerPool
    from heliostat.training.driver.progress import ProgressReporter
    from heliostat.training.memory_keeper import CopySource
    from heliostat.training.worker.build import WorkerSummary

log = logging.getLogger(__name__)

ENDS = {  # MLflow's status and the ledger's outcome, by the state in which a command ends
    RunState.FINISHED: ("FINISHED", "finished"),
    RunState.STOPPED: ("KILLED", "interrupted"),
    RunState.FAILED: ("FAILED", "failed"),
}


@dataclass
class RunHooks:
    """Embeds a run in something larger, such as a sweep: who gets its events and may stop it, and which tags MLflow gets."""

    started: float  # wall clock
    signals: Signals
    pauses: PausePoints
    hear: Callable[[Event], None]  # gets every event of the workers
    tags: dict[str, str]  # of the MLflow run
    closing: dict[str, str] = field(default_factory=dict)  # tags at its end


class DrivenRun:
    """Carries a claimed and planned run out: attempts one after another, then what follows the last step."""

    owner: RunOwner  # of the MLflow run
    pool: WorkerPool
    memory: Memory
    show: ProgressReporter

    def __init__(
        self,
        checked: Checked,
        lease: Lease,
        start_step: int,
        started: float,
        verbose: bool = False,
        tags: dict[str, str] | None = None,
        hooks: RunHooks | None = None,
    ) -> None:
        self.job, self.checked, self.lease, self.tags = checked.job, checked, lease, tags or {}
        self.plan, self.order = checked.plan, checked.order
        self.counts = checked.job.worker_counts(checked.plan.shape.lanes)
        self.start_step, self.started, self.verbose = start_step, started, verbose
        self.saved_step = start_step  # of the newest checkpoint in storage; an attempt may start from a newer copy in memory
        self.hooks = hooks
        self.signals = Signals()  # those that stop it, from when it trains on
        self.state = States(self.job.name)
        self.budget, self.suspicions = Budget(self.job.retries), suspects.Suspicions()
        self.restarts = 0
        self.trust_memory = True  # copies of the training state there: they are as good as the newest checkpoint, and newer
        self.warm_up = WarmUp(checked.recipe)
        self.beside = Beside(self.job)
        self.ledger = LedgerRecorder(self.job.run_folder, started, start_step, max(self.counts))
        self.spending = Spending(self.job, self.ledger)

    def run(self) -> endings.Ending:
        """Trains, then exports, logs and registers the model."""

        def work() -> endings.Ending:
            summary = self._train()
            return self._finalize(layout.open_checkpoint(self.job.run_folder, self.job.last_step), summary)

        try:
            result = self._with_mlflow_run(work)
            self.beside.wait()  # until it has seen that this run has ended
            return result
        finally:
            self.beside.end()

    def train_only(self) -> endings.Ending:
        """Trains without exporting or registering the model."""
        return self._with_mlflow_run(self._train)

    def finalize(self, last: SavedCheckpoint) -> endings.Ending:
        """Finalizes from the last checkpoint, without training, where an earlier command did not complete this."""
        summary = endings.read(self.job.run_folder, last, self.job)
        self.state.to(RunState.FINALIZING)
        return self._with_mlflow_run(lambda: self._finalize(last, summary))

    def catch_up(self) -> None:
        """Logs to MLflow what an earlier command could not log at its end: its metrics, or only that the run has finished."""
        ended = liveness.last(self.job.run_folder)
        if (ended and ended.outcome != "finished") or self.job.run_folder.join(paths.UNLOGGED).exists():
            self._with_mlflow_run(dict)

    def _with_mlflow_run(self, work: Callable[[], endings.Ending]) -> endings.Ending:
        """Does the work with an owner of the MLflow run, whose status is right however the work ends."""
        self.owner = RunOwner(self.job, self.checked.manifests, self.tags, self.plan.version)
        self.ledger.beat(force=True)  # from here on the run has a driver
        try:
            result = work()
        except LeaseError as e:  # the MLflow run is another driver's now
            self.state.to(RunState.FAILED)
            self.ledger.close("failed", str(e))
            raise
        except (KeyboardInterrupt, StoppedError) as e:
            self._end(RunState.STOPPED, str(e) or "interrupted")
            raise
        except Exception as e:
            self._end(RunState.FAILED, str(e))
            raise
        self._end(RunState.FINISHED)
        return result

    def _end(self, state: RunState, reason: str = "") -> None:
        self.state.to(state)
        report, (status, outcome) = self.ledger.report(), ENDS[state]
        report["attempts"][-1] |= {"outcome": outcome, "reason": reason}
        try:
            self.owner.finish(status, reason, report, self.hooks.closing if self.hooks else None)
        finally:
            self.ledger.close(outcome, reason)

    # training --------------------------------------------------------------------------------------------------------

    def _train(self) -> endings.Ending:
        """Starts attempts one after another until the last step is done or another attempt would be of no use."""
        from heliostat.cluster import nodes
        from heliostat.cluster.connect import connect
        from heliostat.training.driver.memory import Memory
        from heliostat.training.driver.pool import WorkerPool
        from heliostat.training.driver.progress import ProgressReporter

        workers = self.job.workers
        most = max(self.counts)
        with ProgressReporter(console, self.job.name, self.start_step, self.job.last_step, unit(self.job)) as self.show:
            # data tasks need CPUs of their own; on a small machine these are logical, and mostly wait
            connect(
                cpus=max(os.cpu_count() or 1, round(most * workers.cpus) + 2),
                gpus=round(most * workers.gpus),
                verbose=self.verbose,
            )
            self.show.phase("ray", time.time())
            self.spending.look(nodes.inventory())
            memory = Memory(self.job)
            with self.hooks.signals if self.hooks else Signals() as self.signals, WorkerPool(workers) as self.pool, memory:
                self.memory = memory
                trained = self._attempts()
        summary: endings.Ending = {**trained, **self.show.startup(self.started), "restarts": self.restarts}
        del summary["stop"]
        self.lease.fence.check()
        endings.write(self.job.run_folder, summary)
        if self.signals.name:
            raise self._stopped("after the last step", "use --resume to export and register the model")
        return summary

    def _attempts(self) -> WorkerSummary:
        """Makes attempts until one has made the last step; returns its summary."""
        while True:
            again = "" if self.state.now is RunState.STARTING else f"{self.state.now}: "
            self.show.note(f"{again}starting the workers")
            try:
                summary = self._attempt()
            except HeliostatError as e:
                self._recover(e)
                continue
            if summary["stop"] == RUN:
                self.state.to(RunState.FINALIZING)
                return summary
            self._handle_stop(summary["stop"], summary["steps"])

    def _attempt(self) -> WorkerSummary:
        from heliostat.cluster import nodes
        from heliostat.training.driver.attempt import Attempt, Start

        count = self.counts[0]
        if len(self.counts) > 1:
            nodes.ask_for(self.job.workers, max(self.counts))
            count = choose(self.counts, nodes.room_now(self.job, self.pool.held(), self.pool.avoided()))
        source = self._from_memory()
        self.lease.fence.check()
        segments.begin(self.job.run_folder, self.plan, self.start_step)
        self.owner.post(AttemptStarted(start_step=self.start_step, workers=count, nodes=nodes.inventory()))
        start = Start(
            self.job.on(count),
            self.counts,
            self.plan,
            self.order,
            self.checked.manifests,
            self.start_step,
            self.lease.fence,
            self.memory,
            source,
            self.hooks.pauses if self.hooks else PausePoints(),
        )
        self.done = self.start_step
        return Attempt(start, self.pool, self.signals, self._take, self._beat).run()

    def _take(self, event: Event) -> None:
        """Hands an event of the workers to the ledger, MLflow, the terminal, and the sweep or suite that the run is a part of."""
        if isinstance(event, Steps):
            self.done = event.done
            self.trust_memory = True
            self.state.stepped()
            event.sources = self._sources(self.done)
            if self.done >= self.job.last_step and not self.hooks:
                self.warm_up.begin()
        elif isinstance(event, NodeSample):
            event.step = self.done
        self.owner.post(event)
        self.ledger.event(event)
        if isinstance(event, Saved):
            self.owner.post(Goodput(report=self.ledger.report(), step=event.step, at=event.at))
            if not self.hooks:
                self.beside.begin()
        self.show.event(event)
        if self.hooks:
            self.hooks.hear(event)

    def _from_memory(self) -> CopySource | None:
        """Finds newer copies of the training state in memory than the checkpoint, and makes the next attempt start from them."""
        avoided = self.pool.avoided()
        source = self.memory.newest(self.saved_step, self.plan.digest, avoided) if self.trust_memory else None
        self.start_step = source.step if source else self.saved_step
        if source:
            log.warning("going on from step %d, of which the nodes' memory holds copies", source.step)
            self.trust_memory = False  # until that has made a step
        return source

    def _beat(self) -> None:
        """Updates the ledger, raises the error if the lease was lost, and stops the run at a limit; to be called often."""
        self.ledger.beat()
        if self.lease.lost:
            raise self.lease.lost
        if self.spending.due():
            if self.spending.lacks_price:
                from heliostat.cluster import nodes

                self.spending.look(nodes.inventory())
            if reached := self.spending.check():
                self.signals.limit(reached)

    def _recover(self, error: HeliostatError) -> None:
        """Prepares another attempt after a failure, or raises the error."""
        kind = classify(error)
        if isinstance(error, StoppedError):
            reached = self.spending.reached
            raise LimitError(str(error) if reached in str(error) else f"{reached}; {error}") if reached else error
        if kind == "final" or (isinstance(error, AccessError) and suspects.refuses_driver(error, self.job)):
            raise error
        if kind == "queued":
            log.warning("%s; trying again", error)
            self._restart(RunState.RECOVERING, "failed", str(error))
            self.trust_memory = True  # nothing was tried
            self._pause(self.job.retries.backoff)
            return
        if kind in ("corrupt", "spike") or isinstance(error, CorruptionError):  # the run goes back to before what is in memory
            self.memory.forget()
        try:
            newest = suspects.trusted(self.job.run_folder, error)
            step = newest.step if newest else 0
        except StorageError as e:  # still away: the next attempt looks from where this one began
            log.warning("%s", e)
            step = self.saved_step
        reason = "; ".join([str(error), *self._exclude(error, step)])
        wait = self.budget.spend(error, step)
        again = f"retry {self.budget.used} of {self.budget.retries.max}"
        log.warning("%s; going on from step %d in %.0f s (%s)", error, step, wait, again)
        self._restart(RunState.RECOVERING, "failed", reason)
        self.start_step = self.saved_step = step
        if len(kept := tuple(skip for skip in self.plan.skips if skip[0] <= step)) < len(self.plan.skips):
            self._follow(kept)  # what was left out from a later step on is decided again
        if isinstance(error, LossSpikeError):
            self._leave_out(max(step, error.step - 1), error.step)
        self._pause(wait)

    def _exclude(self, error: HeliostatError, step: int) -> list[str]:
        """Excludes the nodes that a failure shows to be bad; returns what was done, if anything. `step`: of the checkpoint."""
        if isinstance(error, AccessError):
            suspects.avoid_refused(error.node, self.job, min(self.counts), self.pool)
        if isinstance(error, CorruptionError):
            self.owner.post(Corruption(nodes=error.nodes, text=str(error)))
        if not (bad := self.suspicions.note(error, step)):
            return []
        done = suspects.exclude(bad, self.job, min(self.counts), self.pool)
        self.owner.post(BadNodes(nodes=bad, text=f"{error}; {done}"))
        return [done]

    def _pause(self, seconds: float) -> None:
        """Waits before the next attempt; raises the error of a run that is ordered to stop meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.signals.name:
            self._beat()
            time.sleep(0.1)
        if self.signals.name:
            fix = "raise it and use" if self.spending.reached else "use"
            raise self._stopped("between two attempts", f"{fix} --resume to go on from step {self.start_step}")

    def _leave_out(self, first: int, last: int) -> None:
        """Leaves the samples of steps [first, last] out of the training: the sequence continues after them."""
        self._follow((*self.plan.skips, (self.start_step, first, last - first + 1)))
        log.warning("the samples of steps %d to %d are left out", first + 1, last + 1)

    def _follow(self, skips: tuple[tuple[int, int, int], ...]) -> None:
        """Follows the plan with these skips from the next attempt on."""
        self.plan = dataclasses.replace(self.plan, skips=skips)
        self.order = make_order(self.plan, self.checked.manifests)

    def _handle_stop(self, stop: int, step: int) -> None:
        """Handles a stop that the workers were ordered to make after the checkpoint of `step`."""
        if stop == INTERRUPTED:
            where = f"stopped at step {step}, after a checkpoint"
            if reached := self.spending.reached:
                raise LimitError(f"{reached}; {where}; raise it and use --resume to go on")
            raise StoppedError(f"{where}; use --resume to go on")
        self.start_step = self.saved_step = step
        self._restart(RunState.RESIZING, STOPS[stop])

    def _restart(self, state: RunState, outcome: str, reason: str = "") -> None:
        self.state.to(state)
        self.restarts += 1
        self.ledger.restart(outcome=outcome, reason=reason)

    def _sources(self, step: int) -> dict[str, dict[str, float]]:
        """Counts by source name what it contributed to this sequence's steps before `step`: tokens or samples, and epochs."""
        order, manifests = self.order, self.checked.manifests
        names = [m.meta.get("name", m.location.name) for m in manifests]
        taken = order.consumed(step)
        return {
            name if names.count(name) == 1 else f"{name}.{i}": {
                "tokens": float(taken[i] * (self.job.data.sequence_length or 0)),
                "samples": float(taken[i]),
                "epochs": float(taken[i] / order.epoch_samples[i]),
            }
            for i, name in enumerate(names)
        }

    def _finalize(self, last: SavedCheckpoint, summary: endings.Ending) -> endings.Ending:
        self.warm_up.wait()
        return finalize(self.checked, self.lease, self.ledger, self.owner, last, summary)

    def _stopped(self, where: str, fix: str) -> StoppedError:
        """Makes the error of a run that stops: of the limit that is reached, if there is one, else of the signal."""
        if reached := self.spending.reached:
            return LimitError(f"{reached}; stopped {where}; {fix}")
        return StoppedError(f"stopped by {self.signals.name} {where}; {fix}")
