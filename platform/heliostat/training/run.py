"""Runs a training job from the driver.

    from heliostat.training.run import train
    result = train(Path("jobs/quickstart.yaml"))

Every run takes the same path:

- load the job file
- check everything that doesn't depend on the run
- claim the run
- plan its data from its last checkpoint
- train, export, and register the model (`driver/run.py`)

`heliostat train --json` prints the result. The run's folder has the result as `result.json`.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from heliostat.checkpoint import layout
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.cluster import private_ray
from heliostat.config import pretrained, spec
from heliostat.config.spec import Job
from heliostat.data.dataset import DataPlan
from heliostat.errors import ConfigError
from heliostat.recipes import adapters, built_in, loading
from heliostat.runs import summary as endings
from heliostat.storage import lease
from heliostat.storage.run_folder import require_one_way
from heliostat.storage.waiting import wait_for_store
from heliostat.terminal import console
from heliostat.tracking.tags import SOURCE_NAME
from heliostat.training import AHEAD
from heliostat.training.driver.run import DrivenRun, RunHooks
from heliostat.validation import audit_lines, check
from heliostat.validation.check import Checked

log = logging.getLogger(__name__)


def train(path: Path, settings: list[str] | None = None, *options: Any, **named: Any) -> dict[str, Any]:
    """Loads a job file, applies `key.path=value` settings, and trains the job. For the other options, see `train_job`.

    Raises a HeliostatError that explains in one line why the run stopped.
    """
    named["tags"] = source(path) | (named.get("tags") or {})
    resume = bool(options[0] if options else named.get("resume"))
    return train_job(check.load_job(path, settings, resume=resume), *options, **named)


def source(path: Path) -> dict[str, str]:
    """Returns the MLflow tag that records a run's job file.

    Returns an empty mapping on a cluster: the file has another name there, and the run records its submitter.
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
    """Trains a job to its last step. Returns the run's result.

    `recorded`: the recorded data plan that the job's data must equal, if a run is reproduced. `tags`: tags of a new MLflow run.
    `started`: Unix time in seconds from which the ledger counts [default: now].

    Raises a HeliostatError that explains in one line why the run stopped.
    """
    require_one_way(resume, overwrite)
    _require_settled(job)
    started = started or time.time()
    if resume:
        wait_for_store(job.run_folder)
        job = _as_recorded(job)
    if not (resume and job.last_step in layout.steps(job.run_folder)):  # the work after the last step needs no workers
        private_ray.ahead(job.workers.gpus, [*AHEAD, *built_in.modules(job.recipe, job.model)])
    job, recipe = check.check_setup(job, resume)
    with lease.take(job.run_folder) as taken:
        last = None if overwrite else _last_checkpoint(job, resume)
        checked = _plan(_settled(job, last), recipe, last, recorded, allow_data_change)
        if overwrite:
            taken.fence.check()
            lease.clear(job.run_folder)
        if checked.audit and last is None:
            for line in audit_lines.lines(checked.audit, console.is_terminal and not console.no_color):
                console.print(line, soft_wrap=True)
        return _carry_out(DrivenRun(checked, taken, last.step if last else 0, started, verbose, tags), last)


def _as_recorded(job: Job) -> Job:
    """Returns the job with Hub models pinned to the commits that the run began with."""
    last = layout.latest(job.run_folder) if pretrained.moves(job) else None
    return pretrained.as_recorded(job, last.index.job) if last else job


def _require_settled(job: Job) -> None:
    if job.train.parallel.auto:
        raise ConfigError(
            "train.parallel: auto works only with `heliostat train`, `heliostat submit`, and heliostat.train. "
            "Set the parallelism configuration that `heliostat plan JOB --rank` finds"
        )


def _last_checkpoint(job: Job, resume: bool) -> SavedCheckpoint | None:
    """Finds the run's newest checkpoint. Raises ConfigError if there is a checkpoint, but `resume` is false."""
    checkpoint = layout.latest(job.run_folder)
    if checkpoint and not resume:
        raise ConfigError(
            f"name: run {job.name!r} already has checkpoints up to step {checkpoint.step} in {job.run_folder}. "
            "Use --resume to continue, --overwrite to start from scratch (in Python: resume=True, overwrite=True), or "
            "another name"
        )
    return checkpoint


def _settled(job: Job, checkpoint: SavedCheckpoint | None) -> Job:
    """Returns the job with the keys that the checkpoint's run determines. Raises ConfigError if the job can't continue from this
    checkpoint."""
    if checkpoint is None:
        return spec.settle(job, None)
    recorded = checkpoint.index.job
    if issubclass(loading.recipe_class(job), adapters.Adapts):  # other recipes may have an `adapter` of their own
        adapters.require_resumable(job.model, recorded["model"])
    return spec.settle(job, recorded)


def _plan(job: Job, recipe: Any, checkpoint: SavedCheckpoint | None, recorded: DataPlan | None, allow_change: bool) -> Checked:
    """Plans the job's data to match the checkpoint's data plan, or, without a checkpoint, the recorded plan.

    Raises ConfigError if the samples would differ. With a checkpoint and `allow_change`, logs a warning instead.
    """
    recorded = DataPlan.parse(checkpoint.index.data) if checkpoint else recorded
    checked = check.check_data(job, recipe, recorded)
    changes = recorded.differences(checked.plan) if recorded else []
    if not changes:
        return checked
    if checkpoint is None:
        raise ConfigError("the data differs from the recorded run's data:\n  " + "\n  ".join(changes))
    if not allow_change:
        raise ConfigError(
            (
                "the run's samples would change on resume. Undo the changes, use another name, or start a new segment of "
                "the run with --allow-data-change:\n  "
            )
            + "\n  ".join(changes)
        )
    log.warning("the run's samples change after step %d: %s", checkpoint.step, "; ".join(changes))
    return check.check_data(job, recipe, recorded, change_at=checkpoint.step)


def _carry_out(run: DrivenRun, checkpoint: SavedCheckpoint | None) -> dict[str, Any]:
    """Trains from the checkpoint and exports the model.

    If all steps are done, completes only the work after the training that is still missing.
    """
    job = run.job
    if checkpoint is None or checkpoint.step < job.last_step:
        run.spending.require_left()
        pretrained.located(job)  # downloads in the driver: if the Hub rejects it, the command ends before workers start
        return run.run()
    log.info("run %s has finished: step %d of %d", job.name, checkpoint.step, job.last_step)
    if (result := endings.result(job.run_folder, checkpoint.step)) is None:
        return run.finalize(checkpoint)
    recorded = checkpoint.index.job
    now = job.on(recorded["workers"]["count"]) if isinstance(job.workers.count, list) else job
    if changed := spec.changed_keys(recorded, now.dump()):
        log.warning(
            "the run ignores the changes in the job file: %s. To train with these changes, use another name", ", ".join(changed)
        )
    run.catch_up()
    return result


def train_with_hooks(job: Job, hooks: RunHooks) -> dict[str, Any]:
    """Trains a job to its last step as part of something larger, such as a sweep.

    Starts from the run's last checkpoint if the run has one; exports nothing.

    Returns the summary of the training, which is also in the run's folder.
    """
    _require_settled(job)
    job, recipe = check.check_job(job)
    if job.evaluate and job.evaluate.benchmarks:
        log.warning("evaluate.benchmarks: not supported in trials. Score the best trial: heliostat model benchmark")
    with lease.take(job.run_folder) as taken:
        checkpoint = layout.latest(job.run_folder)
        job = _settled(job, checkpoint)
        recorded = DataPlan.parse(checkpoint.index.data) if checkpoint else None
        checked = check.check_stores(job, recipe, recorded, resume=checkpoint is not None)
        run = DrivenRun(checked, taken, checkpoint.step if checkpoint else 0, hooks.started, tags=hooks.tags, hooks=hooks)
        if checkpoint is None or checkpoint.step < job.last_step:
            return run.train_only()
        run.catch_up()
        return endings.read(job.run_folder, checkpoint, job, checked.sample_tokens)


def finalize(job: Job) -> dict[str, Any]:
    """Exports, logs, and registers the model of a run whose steps are all done. Returns the run's result."""
    job, recipe = check.check_job(job)
    if (result := endings.result(job.run_folder, job.last_step)) is not None:
        return result
    with lease.take(job.run_folder) as taken:
        last = layout.open_checkpoint(job.run_folder, job.last_step)
        checked = check.check_stores(_settled(job, last), recipe, DataPlan.parse(last.index.data), resume=True)
        return DrivenRun(checked, taken, job.last_step, time.time()).finalize(last)
