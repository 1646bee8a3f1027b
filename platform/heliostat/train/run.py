"""Runs a training job from the driver: starts and restarts the workers, updates MLflow and the terminal, exports, registers.

    from heliostat.train.run import train
    result = train(Path("jobs/quickstart.yaml"))

Each run takes the same path: load the file, check what does not depend on the run, claim the run, plan its data from its last
checkpoint, and carry it out. The result is what `heliostat train --json` prints; it is also written to `result.json` in the run's
folder. docs/reliability.md describes what happens when something fails.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import heliostat.check as check
from heliostat import lease
from heliostat import run_folder as paths
from heliostat.check import Checked
from heliostat.checkpoint import layout
from heliostat.checkpoint.layout import Checkpoint
from heliostat.cluster import preloads, private_ray
from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.data.dataset import DataPlan, make_order
from heliostat.errors import (
    ConfigError,
    CorruptionError,
    HeliostatError,
    LeaseError,
    LossSpikeError,
    StoppedError,
    StorageError,
)
from heliostat.events import AttemptStarted, Corruption, Event, Goodput, NodeSample, Saved, Steps
from heliostat.lease import Lease
from heliostat.recipes.protocol import Exports, Serves
from heliostat.runs import goodput, liveness, segments
from heliostat.runs import summary as endings
from heliostat.terminal import console
from heliostat.track.logger import RunOwner
from heliostat.track.tags import SOURCE_NAME
from heliostat.train.driver import corruption
from heliostat.train.driver.benchmarks import Beside
from heliostat.train.driver.recovery import Budget, choose, classify
from heliostat.train.driver.signals import Signals
from heliostat.train.driver.warm_up import WarmUp
from heliostat.train.pauses import PausePoints
from heliostat.train.stop_codes import INTERRUPTED, RUN, STOPS
from heliostat.train.time_ledger import Recorder

if TYPE_CHECKING:  # Ray takes a second
    from heliostat.train.memory_keeper import Source

log = logging.getLogger(__name__)

LEFT = {  # what a run leaves whose model is not logged, by whether its recipe exports
    True: "is not served; `heliostat export` writes the model",
    False: "is not exported; what the run leaves are its checkpoints",
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


def train(path: Path, settings: list[str] | None = None, *options: Any, **named: Any) -> dict[str, Any]:
    """Loads a job file, applies `key.path=value` settings, and trains the job; the options are those of `train_job`."""
    named["tags"] = source(path) | (named.get("tags") or {})
    return train_job(check.load_job(path, settings), *options, **named)


def source(path: Path) -> dict[str, str]:
    """Returns the tag that records a run's job file.

    None on a cluster: there the file has another name, and the run records its submitter.
    """
    return {} if os.environ.get("HELIOSTAT_CLUSTER") else {SOURCE_NAME: str(path)}


def train_job(
    job: Job,
    resume: bool = False,
    overwrite: bool = False,
    allow_data_change: bool = False,
    verbose: bool = False,
    recorded: DataPlan | None = None,
    tags: dict[str, str] | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Trains a job to its last step; raises a HeliostatError of one line for whatever stopped it.

    `recorded`: for a run that is reproduced, the data plan that its data must give; `tags`: of a new MLflow run; `started`: wall
    clock from which the ledger counts, now if it is not given.
    """
    started = started or time.time()
    if not (resume and job.last_step in layout.steps(job.run_folder)):  # what follows the last step takes no workers
        private_ray.ahead(job.workers.gpus, preloads.modules(job.recipe, job.model))
    job, recipe = check.check_setup(job)
    with lease.take(job.run_folder) as held:
        found = None if overwrite else _last_checkpoint(job, resume)
        checked = _plan(spec.settle(job, found.index["job"] if found else None), recipe, found, recorded, allow_data_change)
        if overwrite:
            held.fence.check()
            lease.clear(job.run_folder)
        return _carry_out(_Run(checked, held, found.step if found else 0, started, verbose, tags), found)


def _last_checkpoint(job: Job, resume: bool) -> Checkpoint | None:
    """Finds the run's newest checkpoint; ConfigError if the run has begun, and the command does not ask to resume it."""
    found = layout.latest(job.run_folder)
    if found and not resume:
        raise ConfigError(
            f"name: run {job.name!r} already has checkpoints up to step {found.step} in {job.run_folder}; "
            "use --resume to go on, --overwrite to start anew, or another name"
        )
    return found


def _plan(job: Job, recipe: Any, found: Checkpoint | None, recorded: DataPlan | None, allow_change: bool) -> Checked:
    """Plans the job's data like the checkpoint, or the recorded plan; ConfigError if the samples would differ."""
    recorded = DataPlan.parse(found.index["data"]) if found else recorded
    checked = check.check_data(job, recipe, recorded)
    changes = recorded.differences(checked.plan) if recorded else []
    if not changes:
        return checked
    if found is None:
        raise ConfigError("the data is not what it was for the recorded run:\n  " + "\n  ".join(changes))
    if not allow_change:
        raise ConfigError(
            "the run's samples would change on resume; undo this, use another name, or start a new segment of the run with "
            "--allow-data-change:\n  " + "\n  ".join(changes)
        )
    log.warning("the run's samples change behind step %d: %s", found.step, "; ".join(changes))
    return check.check_data(job, recipe, recorded, change_at=found.step)


def _carry_out(run: _Run, found: Checkpoint | None) -> dict[str, Any]:
    """Trains from the checkpoint on and exports; if all steps are done, completes what is missing after the training."""
    job = run.job
    if found is None or found.step < job.last_step:
        return run.run()
    log.info("run %s has finished: step %d of %d", job.name, found.step, job.last_step)
    if (result := endings.result(job.run_folder, found.step)) is None:
        return run.finalize(found)
    run.catch_up()
    return result


def train_with_hooks(job: Job, hooks: RunHooks) -> dict[str, Any]:
    """Trains a job to its last step as part of something larger, from its last checkpoint if it has one; exports nothing.

    Returns the summary of the training, which is also in the run's folder.
    """
    job, recipe = check.check_job(job)
    if job.evaluate and job.evaluate.benchmarks:
        log.warning("evaluate.benchmarks: is not done for trials; score the best with `heliostat benchmark`")
    with lease.take(job.run_folder) as held:
        found = layout.latest(job.run_folder)
        job = spec.settle(job, found.index["job"] if found else None)
        recorded = DataPlan.parse(found.index["data"]) if found else None
        checked = check.check_stores(job, recipe, recorded)
        run = _Run(checked, held, found.step if found else 0, hooks.started, tags=hooks.tags, hooks=hooks)
        if found is None or found.step < job.last_step:
            return run.train_only()
        run.catch_up()
        return endings.read(job.run_folder, found, job)


def finalize(job: Job) -> dict[str, Any]:
    """Finalizes a run whose steps are all done: exports, logs and registers the model; returns the run's result."""
    job, recipe = check.check_job(job)
    if (result := endings.result(job.run_folder, job.last_step)) is not None:
        return result
    with lease.take(job.run_folder) as held:
        last = layout.open_checkpoint(job.run_folder, job.last_step)
        checked = check.check_stores(spec.settle(job, last.index["job"]), recipe, DataPlan.parse(last.index["data"]))
        return _Run(checked, held, job.last_step, time.time()).finalize(last)


class _Run:
    def __init__(
        self,
        checked: Checked,
        held: Lease,
        start_step: int,
        started: float,
        verbose: bool = False,
        tags: dict[str, str] | None = None,
        hooks: RunHooks | None = None,
    ) -> None:
        self.job, self.checked, self.lease, self.tags = checked.job, checked, held, tags or {}
        self.plan, self.order = checked.plan, checked.order
        self.counts = checked.job.worker_counts(checked.plan.shape.lanes)
        self.start_step, self.started, self.verbose = start_step, started, verbose
        self.saved_step = start_step  # of the newest checkpoint in storage; an attempt may start from a newer copy in memory
        self.hooks = hooks
        self.budget = Budget(self.job.retries)
        self.restarts = 0
        self.trust_memory = True  # copies of the training state there: they are as good as the newest checkpoint, and newer
        self.warm_up = WarmUp(checked.recipe)
        self.beside = Beside(self.job)
        self.ledger = Recorder(self.job.run_folder, started, start_step, max(self.counts))

    def run(self) -> dict[str, Any]:
        """Trains, then exports, logs and registers the model."""

        def work(owner: RunOwner) -> dict[str, Any]:
            summary = self._train(owner)
            return self._finalize(owner, layout.open_checkpoint(self.job.run_folder, self.job.last_step), summary)

        try:
            result = self._with_mlflow_run(work)
            self.beside.wait()  # until it has seen that this run has ended
            return result
        finally:
            self.beside.end()

    def train_only(self) -> dict[str, Any]:
        """Trains without exporting or registering the model."""
        return self._with_mlflow_run(self._train)

    def finalize(self, last: Checkpoint) -> dict[str, Any]:
        """Finalizes from the last checkpoint, without training, where an earlier command did not complete this."""
        summary = endings.read(self.job.run_folder, last, self.job)
        return self._with_mlflow_run(lambda owner: self._finalize(owner, last, summary))

    def catch_up(self) -> None:
        """Logs to MLflow what an earlier command could not log at its end: its metrics, or only that the run has finished."""
        ended = liveness.last(self.job.run_folder)
        if (ended and ended.outcome != "finished") or self.job.run_folder.join(paths.UNLOGGED).exists():
            self._with_mlflow_run(lambda owner: None)

    def _with_mlflow_run(self, work: Any) -> dict[str, Any]:
        """Does the work with an owner of the MLflow run, whose status is right however the work ends."""
        owner = RunOwner(self.job, self.checked.manifests, self.tags, self.plan.version)
        self.ledger.beat(force=True)  # from here on the run has a driver
        try:
            result = work(owner)
        except LeaseError as e:  # the MLflow run is another driver's now
            self.ledger.close("failed", str(e))
            raise
        except (KeyboardInterrupt, StoppedError) as e:
            self._finish(owner, "KILLED", str(e) or "interrupted")
            raise
        except Exception as e:
            self._finish(owner, "FAILED", str(e))
            raise
        self._finish(owner, "FINISHED")
        return result

    def _finish(self, owner: RunOwner, status: str, reason: str = "") -> None:
        report, outcome = self.ledger.report(), {"KILLED": "interrupted"}.get(status, status.lower())
        report["attempts"][-1] |= {"outcome": outcome, "reason": reason}
        try:
            owner.finish(status, reason, report, self.hooks.closing if self.hooks else None)
        finally:
            self.ledger.close(outcome, reason)

    # training --------------------------------------------------------------------------------------------------------

    def _train(self, owner: RunOwner) -> dict[str, Any]:
        """Starts attempts one after another until the last step is done or another attempt would be of no use."""
        from heliostat.cluster.connect import connect
        from heliostat.train.driver.memory import Memory
        from heliostat.train.driver.pool import Pool
        from heliostat.train.driver.progress import ProgressReporter

        workers = self.job.workers
        most = max(self.counts)
        with ProgressReporter(console, self.job.name, self.start_step, self.job.last_step, _unit(self.job)) as show:
            # data tasks need CPUs of their own; on a small machine these are logical, and mostly wait
            connect(
                cpus=max(os.cpu_count() or 1, round(most * workers.cpus) + 2),
                gpus=round(most * workers.gpus),
                verbose=self.verbose,
            )
            show.phase("ray", time.time())
            held = Memory(self.job)
            with self.hooks.signals if self.hooks else Signals() as signals, Pool(workers) as pool, held as memory:
                while True:
                    show.note("starting the workers")
                    try:
                        summary = self._attempt(owner, show, signals, pool, memory)
                    except HeliostatError as e:
                        self._recover(e, signals, memory)
                        if isinstance(e, CorruptionError):
                            owner.post(Corruption(nodes=e.nodes, text=str(e)))
                            corruption.leave_out(e.nodes, self.job, min(self.counts), pool)
                    else:
                        stop = summary.pop("stop")
                        if stop == RUN:
                            break
                        self._handle_stop(stop, summary["steps"])
        summary |= show.startup(self.started)
        summary["restarts"] = self.restarts
        self.lease.fence.check()
        endings.write(self.job.run_folder, summary)
        if signals.name:
            raise StoppedError(f"stopped by {signals.name} behind the last step; use --resume to export and register the model")
        return summary

    def _attempt(self, owner: RunOwner, show: Any, signals: Signals, pool: Any, memory: Any) -> dict[str, Any]:
        from heliostat.cluster import nodes
        from heliostat.train.driver.attempt import Attempt, Start

        count = self.counts[0]
        if len(self.counts) > 1:
            nodes.ask_for(self.job.workers, max(self.counts))
            count = choose(self.counts, nodes.room_now(self.job, pool.held(), pool.avoided()))
        source = self._from_memory(memory, pool.avoided())
        self.lease.fence.check()
        segments.begin(self.job.run_folder, self.plan, self.start_step)
        owner.post(AttemptStarted(start_step=self.start_step, workers=count, nodes=nodes.inventory()))
        start = Start(
            self.job.on(count),
            self.counts,
            self.plan,
            self.order,
            self.checked.manifests,
            self.start_step,
            self.lease.fence,
            memory,
            source,
            self.hooks.pauses if self.hooks else PausePoints(),
        )

        done = self.start_step

        def take(event: Event) -> None:
            nonlocal done
            if isinstance(event, Steps):
                done = event.done
                self.trust_memory = True
                event.sources = self._sources(done)
                if done >= self.job.last_step and not self.hooks:
                    self.warm_up.begin()
            elif isinstance(event, NodeSample):
                event.step = done
            owner.post(event)
            self.ledger.event(event)
            if isinstance(event, Saved):
                owner.post(Goodput(report=self.ledger.report(), step=event.step, at=event.at))
                if not self.hooks:
                    self.beside.begin()
            show.event(event)
            if self.hooks:
                self.hooks.hear(event)

        return Attempt(start, pool, signals, take, self._beat).run()

    def _from_memory(self, memory: Any, avoided: set[str]) -> Source | None:
        """Finds newer copies of the training state in memory than the checkpoint, and makes the next attempt start from them."""
        source = memory.newest(self.saved_step, self.plan.digest, avoided) if self.trust_memory else None
        self.start_step = source.step if source else self.saved_step
        if source:
            log.warning("going on from step %d, of which the nodes' memory holds copies", source.step)
            self.trust_memory = False  # until that has made a step
        return source

    def _beat(self) -> None:
        """Updates the ledger, and raises the error if the lease was lost; to be called often."""
        self.ledger.beat()
        if self.lease.lost:
            raise self.lease.lost

    def _recover(self, error: HeliostatError, signals: Signals, memory: Any) -> None:
        """Prepares another attempt after a failure, or raises the error."""
        kind = classify(error)
        if kind == "final" or isinstance(error, StoppedError):
            raise error
        if kind == "queued":
            log.warning("%s; trying again", error)
            self._restart("failed", str(error))
            self.trust_memory = True  # nothing was tried
            self._pause(self.job.retries.backoff, signals)
            _heed(signals, self.start_step)
            return
        if kind != "failure" or isinstance(error, CorruptionError):  # the run goes back behind what is in memory
            memory.forget()
        try:
            newest = corruption.trusted(self.job.run_folder, error)
            step = newest.step if newest else 0
        except StorageError as e:  # still away: the next attempt looks from where this one began
            log.warning("%s", e)
            step = self.saved_step
        wait = self.budget.spend(error, step)
        again = f"retry {self.budget.used} of {self.budget.retries.max}"
        log.warning("%s; going on from step %d in %.0f s (%s)", error, step, wait, again)
        self._restart("failed", str(error))
        self.start_step = self.saved_step = step
        if len(kept := tuple(skip for skip in self.plan.skips if skip[0] <= step)) < len(self.plan.skips):
            self.plan = dataclasses.replace(self.plan, skips=kept)  # what was left out from a later step on is decided anew
            self.order = make_order(self.plan, self.checked.manifests)
        if isinstance(error, LossSpikeError):
            self._leave_out(max(step, error.step - 1), error.step)
        self._pause(wait, signals)
        _heed(signals, step)

    def _pause(self, seconds: float, signals: Signals) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not signals.name:
            self._beat()
            time.sleep(0.1)

    def _leave_out(self, first: int, last: int) -> None:
        """Leaves the samples of steps [first, last] out of the training: the sequence goes on behind them."""
        skips = (*self.plan.skips, (self.start_step, first, last - first + 1))
        self.plan = dataclasses.replace(self.plan, skips=skips)
        self.order = make_order(self.plan, self.checked.manifests)
        log.warning("the samples of steps %d to %d are left out", first + 1, last + 1)

    def _handle_stop(self, stop: int, step: int) -> None:
        """Handles a stop that the workers were ordered to make behind the checkpoint of `step`."""
        if stop == INTERRUPTED:
            raise StoppedError(f"stopped at step {step}, behind a checkpoint; use --resume to go on")
        self.start_step = self.saved_step = step
        self._restart(STOPS[stop])

    def _restart(self, outcome: str, reason: str = "") -> None:
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

    # afterwards ------------------------------------------------------------------------------------------------------

    def _finalize(self, owner: RunOwner, last: Checkpoint, summary: dict[str, Any]) -> dict[str, Any]:
        """Exports the last checkpoint, logs and registers the model, and shows sample outputs.

        Idempotent: after an interruption all of it may run again, which reuses what is there; `result.json` is written last.
        """
        from heliostat.inference.export import export
        from heliostat.track import card
        from heliostat.track.models import log_model

        job = self.job
        self.warm_up.wait()
        self.lease.fence.check()
        owner.client()  # MLflow is there, and the run is open
        model_uri: str | None = None
        samples: list[tuple[str, str]] = []
        if isinstance(self.checked.recipe, Exports):
            with tempfile.TemporaryDirectory(prefix="heliostat-export-") as name, console.status("exporting the model"):
                folder = Path(name) / "model"
                recipe: Any = export(last, folder, owner.run_id)
                card.write(folder, job, owner.run_id, last.step, summary["eval"], self.checked.manifests)
                if isinstance(recipe, Serves):
                    model_uri = log_model(job, owner.run_id, last, folder, recipe, summary["eval"])
                samples = recipe.demonstrate(folder)
        if model_uri is None:
            what = LEFT[isinstance(self.checked.recipe, Exports)]
            log.warning("no model is logged, because %s %s", job.recipe, what)
        owner.describe(model_uri, samples)
        result = {"run_id": owner.run_id, **summary, "model_uri": model_uri, "checkpoint": str(last.location)}
        result["reference"] = {m.location.name: m.meta.get("unigram_entropy") for m in self.checked.manifests}
        result["goodput"] = goodput.summary(self.ledger.report())
        result["unit"] = _unit(job)
        result["samples"] = [{"prompt": p, "text": t} for p, t in samples]
        self.lease.fence.check()
        job.run_folder.join(paths.RESULT).write(json.dumps(result, indent=2).encode())
        return result


def _heed(signals: Signals, step: int) -> None:
    """Raises the error of a run that was told to stop while no worker was there."""
    if signals.name:
        raise StoppedError(f"stopped by {signals.name} between two attempts; use --resume to go on from step {step}")


def _unit(job: Job) -> str:
    """Returns the unit that rates count: tokens or samples."""
    return "tokens" if job.data.sequence_length else "samples"
