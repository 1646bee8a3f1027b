"""Carries out a run in the driver: starts and restarts the workers, and updates the ledger, MLflow, and the terminal.

`heliostat.training.run` claims and plans the run first. `states` decides the driver's actions after an event; this module
performs them. docs/reliability/driver-states.md describes each failure and its handling.
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
from heliostat.data.conversations import row_tokens
from heliostat.data.dataset import make_order
from heliostat.errors import AccessError, CorruptionError, HeliostatError, LeaseError, LimitError, StoppedError, StorageError
from heliostat.runs import liveness, segments
from heliostat.runs import summary as endings
from heliostat.runs.events import AttemptStarted, BadNodes, Corruption, Event, Goodput, NodeSample, Saved, Steps
from heliostat.runs.time_ledger import LedgerRecorder
from heliostat.storage import run_folder as paths
from heliostat.storage.lease import Lease
from heliostat.terminal import console
from heliostat.tracking.logger import RunOwner
from heliostat.training.driver import states, suspects
from heliostat.training.driver.finalize import Beside, WarmUp, finalize, unit
from heliostat.training.driver.limits import Spending
from heliostat.training.driver.recovery import Budget, choose
from heliostat.training.driver.signals import Signals
from heliostat.training.driver.states import Course, RunState
from heliostat.training.stops import PausePoints
from heliostat.validation.check import Checked

if TYPE_CHECKING:  # importing Ray takes a second
    from heliostat.training.driver.memory import Memory
    from heliostat.training.driver.pool import WorkerPool
    from heliostat.training.driver.progress import ProgressReporter
    from heliostat.training.mailbox import RunMailbox
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
    """Embeds a run in a larger task, such as a sweep. `hear` gets the run's events; `signals` and `pauses` can stop the run."""

    started: float  # Unix time in seconds
    signals: Signals
    pauses: PausePoints
    hear: Callable[[Event], None]  # gets every event of the workers
    tags: dict[str, str]  # tags of the MLflow run
    closing: dict[str, str] = field(default_factory=dict)  # tags that the MLflow run gets at its end


class DrivenRun:
    """Carries out a claimed and planned run: its attempts one after another, then the work after the last step."""

    owner: RunOwner  # owns the MLflow run
    pool: WorkerPool
    memory: Memory
    mailbox: RunMailbox
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
        self.started, self.verbose = started, verbose
        self.course = Course(Budget(checked.job.retries), start_step, start_step, start_step)
        self.hooks = hooks
        self.signals = Signals()  # stop requests; `_train` installs the handlers
        self.suspicions = suspects.Suspicions()
        self.warm_up = WarmUp(checked.recipe)
        self.beside = Beside(self.job)
        self.ledger = LedgerRecorder(self.job.run_folder, started, start_step, max(self.counts))
        self.spending = Spending(self.job, self.ledger)

    def run(self) -> endings.Ending:
        """Trains; then exports, logs, and registers the model."""

        def work() -> endings.Ending:
            summary = self._train()
            return self._finalize(layout.open_checkpoint(self.job.run_folder, self.job.last_step), summary)

        try:
            result = self._with_mlflow_run(work)
            self.beside.wait()  # the process ends once it sees that this run has ended
            return result
        finally:
            self.beside.end()

    def train_only(self) -> endings.Ending:
        """Trains without exporting or registering the model."""
        return self._with_mlflow_run(self._train)

    def finalize(self, last: SavedCheckpoint) -> endings.Ending:
        """Finalizes from the last checkpoint, without training, if an earlier command didn't complete this work."""
        summary = endings.read(self.job.run_folder, last, self.job, self.checked.sample_tokens)
        self._follow(states.AllDone())
        return self._with_mlflow_run(lambda: self._finalize(last, summary))

    def catch_up(self) -> None:
        """Completes the record in MLflow if an earlier command couldn't complete this record.

        Adds the missing metrics, or only sets the status of the finished run.
        """
        ended = liveness.last(self.job.run_folder)
        if (ended and ended.outcome != "finished") or self.job.run_folder.join(paths.UNLOGGED).exists():
            self._with_mlflow_run(dict)

    def _with_mlflow_run(self, work: Callable[[], endings.Ending]) -> endings.Ending:
        """Runs `work` while this process owns the MLflow run, and sets the correct final status even if `work` raises."""
        self.owner = RunOwner(self.job, self.checked.manifests, self.tags, self.plan.version)
        self.owner.audit = self.checked.audit
        self.ledger.beat(force=True)  # from now on, the ledger shows that the run has a driver
        try:
            result = work()
        except LeaseError as e:  # another driver owns the MLflow run now
            self._follow(states.CommandEnded(RunState.FAILED))
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
        self._follow(states.CommandEnded(state))
        report, (status, outcome) = self.ledger.report(), ENDS[self.course.state]
        report["attempts"][-1] |= {"outcome": outcome, "reason": reason}
        try:
            self.owner.finish(status, reason, report, self.hooks.closing if self.hooks else None)
        finally:
            self.ledger.close(outcome, reason)

    # training --------------------------------------------------------------------------------------------------------

    def _train(self) -> endings.Ending:
        """Starts attempts one after another until the last step is done, or until another attempt would be useless."""
        from heliostat.cluster import nodes
        from heliostat.cluster.connect import connect
        from heliostat.training.driver.memory import Memory
        from heliostat.training.driver.pool import WorkerPool
        from heliostat.training.driver.progress import ProgressReporter
        from heliostat.training.mailbox import RunMailbox

        workers = self.job.workers
        most = max(self.counts)
        with ProgressReporter(console, self.job.name, self.course.start, self.job.last_step, unit(self.checked)) as self.show:
            # data tasks need separate CPUs; on a small machine these are logical CPUs, and the tasks mostly wait
            connect(
                cpus=max(os.cpu_count() or 1, round(most * workers.cpus) + 2),
                gpus=round(most * workers.gpus),
                verbose=self.verbose,
            )
            self.show.phase("ray", time.time())
            self.spending.look(nodes.inventory())
            with (
                self.hooks.signals if self.hooks else Signals() as self.signals,
                WorkerPool(workers) as self.pool,
                Memory(self.job) as self.memory,
                RunMailbox() as self.mailbox,
            ):
                trained = self._attempts()
        summary: endings.Ending = {**trained, **self.show.startup(self.started), "restarts": self.course.restarts}
        del summary["stop"]
        self.lease.fence.check()
        endings.write(self.job.run_folder, summary)
        if self.signals.name:
            self._follow(states.Asked(self._stopped("after the last step", "Use --resume to export and register the model")))
        return summary

    def _attempts(self) -> WorkerSummary:
        """Runs attempts until one completes the last step. Returns its summary."""
        while True:
            again = "" if self.course.state is RunState.STARTING else f"{self.course.state}: "
            self.show.note(f"{again}starting the workers")
            self._follow(states.Begin())
            number = self.course.attempt
            try:
                summary = self._attempt(number)
            except HeliostatError as e:
                self._failed(number, e)
                continue
            self._follow(states.Stopped(number, summary["stop"], summary["steps"], self.spending.reached))
            if self.course.state is RunState.FINALIZING:
                return summary

    def _attempt(self, number: int) -> WorkerSummary:
        from heliostat.cluster import nodes
        from heliostat.training.driver.attempt import Attempt, Start

        count = self.counts[0]
        if len(self.counts) > 1:
            nodes.ask_for(self.job.workers, max(self.counts))
            count = choose(self.counts, nodes.room_now(self.job, self.pool.held(), self.pool.avoided()))
        source = self._from_memory(number)
        self.lease.fence.check()
        segments.begin(self.job.run_folder, self.plan, self.course.start)
        self.owner.post(AttemptStarted(start_step=self.course.start, workers=count, nodes=nodes.inventory()))
        start = Start(
            self.mailbox.begin(number),
            self.job.on(count),
            self.counts,
            self.plan,
            self.order,
            self.checked.manifests,
            self.course.start,
            self.lease.fence,
            self.memory,
            source,
            self.hooks.pauses if self.hooks else PausePoints(),
        )
        return Attempt(start, self.pool, self.signals, self._take, self._beat).run()

    def _follow(self, event: states.RunEvent) -> None:
        """Handles an event: updates the run's state (`course`), and carries out the actions that `states.follow` returns."""
        before = self.course
        self.course, actions = states.follow(before, event)
        if self.course.state is not before.state:
            log.debug("run %s: %s -> %s", self.job.name, before.state, self.course.state)
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: states.Action) -> None:
        match action:
            case states.Drop():
                log.debug("dropped %s of attempt %d, which had ended", action.what, action.attempt)
            case states.ForgetCopies():
                self.memory.forget()
            case states.FindCheckpoint():
                self._find_checkpoint(action.error)
            case states.Restart():
                self.ledger.restart(outcome=action.outcome, reason=action.reason)
            case states.GoBack():
                self._go_back(action.step, action.left_out)
            case states.Wait():
                log.warning(action.why)
                self._pause(action.seconds)
            case states.Raise():
                raise action.error

    def _take(self, attempt: int, event: Event) -> None:
        """Passes an event of the workers to the ledger, MLflow, the terminal, and the hooks. Drops events of an attempt that has
        ended."""
        dropped = self.course.dropped
        self._follow(states.WorkerMessage(attempt, type(event).__name__, event.done if isinstance(event, Steps) else None))
        if self.course.dropped > dropped:
            return
        if isinstance(event, Steps):
            event.sources = self._sources(event.done, event.trained)
            if event.done >= self.job.last_step and not self.hooks:
                self.warm_up.begin()
        elif isinstance(event, NodeSample):
            event.step = self.course.done
        self.owner.post(event)
        self.ledger.event(event)
        if isinstance(event, Saved):
            self.owner.post(Goodput(report=self.ledger.report(), step=event.step, at=event.at))
            if not self.hooks:
                self.beside.begin()
        self.show.event(event)
        if self.hooks:
            self.hooks.hear(event)

    def _from_memory(self, attempt: int) -> CopySource | None:
        """Looks for in-memory checkpoints of the same step as the newest checkpoint in storage, or of a later step.

        If in-memory checkpoints exist, the attempt starts from them.
        """
        if not self.course.trust_memory:
            return None
        source = self.memory.newest(attempt, self.course.saved, self.plan.digest, self.pool.avoided())
        if source:
            log.warning("resuming from step %d, from the in-memory checkpoints", source.step)
            self._follow(states.CopiesFound(attempt, source.step))
        return source

    def _beat(self) -> None:
        """Updates the ledger, raises an error if the lease was lost, and stops the run at a limit. Call this method often."""
        self.ledger.beat()
        if self.lease.lost:
            raise self.lease.lost
        if self.spending.due():
            if self.spending.lacks_price:
                from heliostat.cluster import nodes

                self.spending.look(nodes.inventory())
            if reached := self.spending.check():
                self.signals.limit(reached)

    def _failed(self, attempt: int, error: HeliostatError) -> None:
        """Prepares another attempt after a failure, or raises the error."""
        refused = isinstance(error, AccessError) and suspects.refuses_driver(error, self.job)
        self._follow(states.Failed(attempt, error, refused, self.spending.reached))

    def _find_checkpoint(self, error: HeliostatError) -> None:
        """Chooses the checkpoint from which to recover, and excludes nodes if the failure shows that they are bad."""
        try:
            newest = suspects.trusted(self.job.run_folder, error)
            step = newest.step if newest else 0
        except StorageError as e:  # still unreachable: assume the checkpoint from which this attempt started
            log.warning("%s", e)
            step = self.course.saved
        self._follow(states.CheckpointFound(step, tuple(self._exclude(error, step))))

    def _go_back(self, step: int, left_out: tuple[int, int] | None) -> None:
        """Changes the data plan for a return to a checkpoint: removes the skips after `step`, and adds `left_out` as a skip."""
        skips = tuple(skip for skip in self.plan.skips if skip[0] <= step)
        if left_out:
            first, last = left_out
            skips = (*skips, (step, first, last - first + 1))
            log.warning("skipping the samples of steps %d to %d", first + 1, last + 1)
        if skips != self.plan.skips:
            self.plan = dataclasses.replace(self.plan, skips=skips)
            self.order = make_order(self.plan, self.checked.manifests)

    def _exclude(self, error: HeliostatError, step: int) -> list[str]:
        """Excludes nodes if a failure shows that they are bad.

        Returns a description of the action, if any. `step`: the checkpoint's step.
        """
        if isinstance(error, AccessError):
            suspects.avoid_refused(error.node, self.job, min(self.counts), self.pool)
        if isinstance(error, CorruptionError):
            self.owner.post(Corruption(nodes=error.nodes, text=str(error)))
        if not (bad := self.suspicions.note(error, step)):
            return []
        done = suspects.exclude(bad, self.job, min(self.counts), self.pool)
        self.owner.post(BadNodes(nodes=bad, text=f"{error}. {done}"))
        return [done]

    def _pause(self, seconds: float) -> None:
        """Waits before the next attempt. If a signal or a limit stops the run meanwhile, raises the error of this stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.signals.name:
            self._beat()
            time.sleep(0.1)
        if self.signals.name:
            fix = "Raise the limit and use" if self.spending.reached else "Use"
            error = self._stopped("between two attempts", f"{fix} --resume to continue from step {self.course.start}")
            self._follow(states.Asked(error))

    def _sources(self, step: int, trained: list[float]) -> dict[str, dict[str, float]]:
        """Counts the tokens, samples, and epochs that each source has contributed before `step`, by source name. Adds the trained
        tokens per step, if `trained` has them.

        Counts only the current sequence of samples.
        """
        order, manifests = self.order, self.checked.manifests
        names = [m.meta.get("name", m.location.name) for m in manifests]
        taken = order.consumed(step)
        return {
            name if names.count(name) == 1 else f"{name}.{i}": {
                "tokens": float(taken[i] * (self.job.data.sequence_length or row_tokens(manifests[i]))),
                "samples": float(taken[i]),
                "epochs": float(taken[i] / order.epoch_samples[i]),
                **({"trained_tokens": trained[i]} if trained else {}),
            }
            for i, name in enumerate(names)
        }

    def _finalize(self, last: SavedCheckpoint, summary: endings.Ending) -> endings.Ending:
        self.warm_up.wait()
        return finalize(self.checked, self.lease, self.ledger, self.owner, last, summary)

    def _stopped(self, where: str, fix: str) -> StoppedError:
        """Creates the error of a stopped run: for the limit if one is reached, else for the signal."""
        if reached := self.spending.reached:
            return LimitError(f"{reached}; stopped {where}. {fix}")
        return StoppedError(f"stopped by {self.signals.name} {where}. {fix}")
