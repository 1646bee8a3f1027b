"""Runs a sweep from its file to its result, through Ray Tune (`heliostat sweep run`).

    from heliostat.tune.driver import tune
    result = tune(Path("jobs/sweeps/quickstart.yaml"))

To resume a sweep, heliostat needs only the sweep's folder (`trial_record`). While the sweep runs, Ray Tune keeps its own state in
the subfolder `ray/`. heliostat never reads this state, and deletes it at the end.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from heliostat import training
from heliostat.cluster.capacity import FETCHING, fits
from heliostat.config import pretrained, spec
from heliostat.config.spec import Job, Workers
from heliostat.errors import ConfigError, HeliostatError, StoppedError
from heliostat.recipes import built_in
from heliostat.storage import lease
from heliostat.storage.lease import Lease
from heliostat.storage.run_folder import require_one_way
from heliostat.training.driver.signals import Signals
from heliostat.tune import AHEAD, report
from heliostat.tune import trial_record as records
from heliostat.tune.state import SweepState
from heliostat.tune.sweep import SweepPlan, load, renamed_keys
from heliostat.tune.trial_record import BestTrial, KeptTrial, SweepResult, TrialRecord
from heliostat.validation import check

if TYPE_CHECKING:
    from heliostat.tune.parent_run import Parent

log = logging.getLogger(__name__)

TRIAL_CPUS = 0.1  # CPUs that Tune's actor for a trial requests
DEATHS = 3  # deaths of its process or node that a trial survives; the trial's run handles deaths of workers
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # most results contain only the trial's step
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output ignores `verbose`
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
}


def tune(
    path: Path,
    settings: list[str] | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    overwrite: bool = False,
    verbose: bool = False,
) -> SweepResult:
    """Runs a sweep to its end, or resumes it. If the sweep stops, fails, or has no result, a HeliostatError gives the cause in
    one line."""
    require_one_way(resume, overwrite)
    plan = load(path, settings)
    base = Job.model_validate(plan.base)
    job, recipe = check.check_job(base)
    plan = plan.with_rows(check.check_stores(job, recipe, resume=resume).sample_tokens)
    if plan.sweep.searcher.name == "optuna":
        from heliostat.tune.searchers import require_optuna

        require_optuna()
    with lease.take(plan.folder, "driven", f"Wait for that driver, or stop it: heliostat sweep stop {plan.folder}") as lease_:
        before = records.read_json(plan.folder.join("sweep.json"), records.KEPT)
        if before and not overwrite and not resume:
            raise ConfigError(
                f"name: sweep {plan.sweep.name!r} already exists in {plan.folder}. Use --resume to continue, "
                "--overwrite to start from scratch, or change the name"
            )
        if before and overwrite:
            plan.folder.join("sweep.json").delete()
            for folder in ("records", "trials", "result.json", "ray", "stop"):
                plan.folder.join(folder).delete()
            before = None
        plan = _same(plan, before) if before else replace(plan, base=pretrained.pinned(base).dump())
        return _Tuning(plan, before, retry_failed, verbose, lease_).go()


def _same(plan: SweepPlan, before: KeptTrial) -> SweepPlan:
    """Raises ConfigError if a resumed sweep differs from the recorded sweep. The budget, the concurrency, and the registration of
    the model may differ.

    Returns the plan. If the plan's job doesn't set a key of `spec.BEFORE_KEYS`, the plan gets the recorded job's value. So all
    trials follow the same rules.
    """
    plan = replace(plan, base=pretrained.as_recorded(Job.model_validate(plan.base), before["job"]).dump())
    train, rules = plan.base["train"], spec.with_rules(before["job"])["train"]
    unset = {key: rules[key] for key in spec.BEFORE_KEYS if train.get(key) is None}
    plan = replace(plan, base=plan.base | {"train": train | unset})
    free = ("budget", "concurrency", "register_best", "job", "set")  # job and set make the base job, which is compared
    now = {"sweep": {k: v for k, v in plan.sweep.dump().items() if k not in free}, "job": plan.base}
    then = {
        "sweep": {k: v for k, v in renamed_keys(before["sweep"]).items() if k not in free},
        "job": spec.renewed(before["job"]),
    }
    for part in ("sweep", "job"):
        keys = [k for k in {*now[part], *then[part]} if now[part].get(k) != then[part].get(k)]
        if keys:
            key = sorted(keys)[0]
            raise ConfigError(
                f"{part}.{key}: was {json.dumps(then[part].get(key))} when the sweep began, and is "
                f"{json.dumps(now[part].get(key))} now. Undo the change, or use another name"
            )
    return plan


class _Tuning:
    def __init__(self, plan: SweepPlan, before: KeptTrial | None, retry_failed: bool, verbose: bool, lease: Lease) -> None:
        self.plan, self.verbose, self.lease = plan, verbose, lease
        self.before = before or KeptTrial(sweep={}, job={}, run_id="", seconds=0.0)
        self.base = Job.model_validate(plan.base)
        self.records = records.read(plan.folder)
        for record in self.records:
            if record.status == "failed" and retry_failed:
                record.status, record.reason = "waiting", ""
        self.signals = Signals()

    def go(self) -> SweepResult:
        from heliostat.tune.parent_run import Parent

        folder = self.plan.folder
        folder.join("stop").delete()
        concurrency = self._connect()
        parent = Parent(self.plan, self.before["run_id"])
        kept: KeptTrial = {"sweep": self.plan.sweep.dump(), "job": self.plan.base, "run_id": parent.run_id,
                      "created": self.before.get("created", time.time()), "seconds": self.before["seconds"]}  # fmt: skip
        folder.join("sweep.json").write(json.dumps(kept).encode())
        self.state = SweepState(self.plan, self.records, concurrency, parent.run_id, kept["seconds"])
        status, reason = "FAILED", ""
        try:
            if not self._complete():
                log.info("sweep %s: up to %d concurrent trials", self.plan.sweep.name, concurrency)
                self._fit()
            stopped = self.state.stopping and not self.state.used_up
            status, reason = "KILLED" if stopped else "FINISHED", self.state.stopping
        except BaseException as e:
            status, reason = ("KILLED", "interrupted") if isinstance(e, KeyboardInterrupt) else ("FAILED", str(e))
            raise
        finally:
            all_records = sorted(self.state.records.values(), key=lambda r: r.number)
            parent.settle(all_records)
            for record in all_records:
                records.write(folder, record)
            folder.join("sweep.json").write(json.dumps({**kept, "seconds": self.state.seconds}).encode())
            result = self._result(parent.run_id, all_records)
            if status == "FINISHED":
                self._finalize(parent, result, all_records)
            parent.close(status, reason, all_records, result["best"] and result["best"].get("model_uri"))
            folder.join("result.json").write(json.dumps(result, indent=2).encode())
            folder.join("ray").delete()
            folder.join("stop").delete()
        if stopped:
            raise StoppedError(f"stopped ({reason}). Use --resume to continue the sweep")
        if not result["best"]:
            raise HeliostatError(f"sweep {self.plan.sweep.name}: no trial has finished. See `heliostat sweep show {folder}`")
        return result

    def _connect(self) -> int:
        """Connects to Ray or starts it; returns the number of trials that may run concurrently."""
        from heliostat.cluster import nodes, private_ray, ray_internals
        from heliostat.cluster.connect import connect

        workers = self.base.workers
        wanted = self.plan.sweep.concurrency
        os.environ.update(ENVIRONMENT)
        if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
            modules = built_in.modules(self.base.recipe, self.base.model)
            private_ray.ahead(workers.gpus, [*training.AHEAD, *modules, *AHEAD])
            count = wanted or here(workers, os.cpu_count() or 1)
            cpus = count * (workers.most * workers.cpus + FETCHING + 1)
            connect(max(os.cpu_count() or 1, round(cpus) + 1), round(count * workers.most * workers.gpus), self.verbose)
            return count
        connect(1, verbose=self.verbose)
        free = ray_internals.free_resources()
        labeled, leaving = nodes.carrying(workers.labels), nodes.draining()
        most = gangs(workers, {n: r for n, r in free.items() if n in labeled and n not in leaving})
        if not most:
            missing = (
                nodes.missing_now(self.base)
                or f"no room for a trial's own {TRIAL_CPUS:g} CPU in addition to the trial's workers; waiting"
            )
            log.warning("running one trial after another: %s", missing)
        elif wanted and wanted > most:
            log.warning(
                "concurrency: the cluster has room for only %d trials of %d workers each, so heliostat doesn't run %d at once",
                most,
                workers.most,
                wanted,
            )
        return max(1, min(wanted or most, most))

    def _complete(self) -> bool:
        known = self.state.records
        return self.plan.trials is not None and len(known) >= self.plan.trials and all(r.over for r in known.values())

    def _fit(self) -> None:
        from ray import tune as ray_tune

        from heliostat.tune import schedulers, searchers
        from heliostat.tune.trial import Trial

        scheduler = schedulers.make(self.state)
        scheduler.set_search_properties("value", self.plan.sweep.mode)
        scheduler.replay(self.records)
        trials = searchers.Trials(self.state, searchers.make(self.plan.sweep))
        ray_folder = self.plan.folder.join("ray")
        with self.signals, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consider boosting PBT performance")  # by reusing the actors of ended runs
            tuner = ray_tune.Tuner(
                Trial,
                tune_config=ray_tune.TuneConfig(search_alg=trials, scheduler=scheduler, num_samples=1),
                run_config=ray_tune.RunConfig(
                    name=f"{self.plan.sweep.name}-{int(time.time())}",
                    storage_path=ray_folder.path,
                    storage_filesystem=ray_folder.fs,
                    failure_config=ray_tune.FailureConfig(max_failures=DEATHS),
                    callbacks=[schedulers.Watch(self.state, scheduler, self.signals, self.lease, self.base)],
                    verbose=0,
                ),
            )
            tuner.fit()

    def _result(self, run_id: str, all_records: list[TrialRecord]) -> SweepResult:
        best = records.best(all_records, self.plan.sweep.mode)
        rows = report.rows(self.plan, all_records)
        return {
            "sweep": self.plan.sweep.name,
            "folder": str(self.plan.folder),
            "run_id": run_id,
            "seconds": round(self.state.seconds, 1),
            "steps": sum(r.step for r in all_records),
            "tokens": sum(r.tokens for r in all_records),
            "metric": self.plan.sweep.metric,
            "best": _best(self.plan, best),
            "trials": rows,
        }  # fmt: skip

    def _finalize(self, parent: Parent, result: SweepResult, all_records: list[TrialRecord]) -> None:
        """Exports the best trial's model and logs it to the trial's run. If the job sets `mlflow.register`, registers the
        model."""
        best = records.best(all_records, self.plan.sweep.mode)
        if best is None or not self.plan.sweep.register_best:
            return
        from heliostat.training.run import finalize

        log.info("trial %d is the best: %s %.4g", best.number, self.plan.sweep.metric, best.value)
        outcome = finalize(spec.resolve(self.plan.job(best.number, best.params)))
        assert result["best"]
        result["best"]["model_uri"] = outcome["model_uri"]
        if outcome["model_uri"]:
            parent.mark_model(outcome["model_uri"], best.number)


def _best(plan: SweepPlan, best: TrialRecord | None) -> BestTrial | None:
    if best is None:
        return None
    folder = str(plan.folder.join("trials", plan.name(best.number)))
    return {"trial": best.number, "value": best.value, "params": best.params, "run_id": best.run_id, "run_folder": folder}


def gangs(workers: Workers, free: Mapping[str, Mapping[str, float]]) -> int:
    """Counts the trials that can run concurrently with all their workers. Counts only complete trials, because trials that get
    only some of their workers wait for each other forever.

    In addition to its workers, each trial needs a CPU for its data task, and the CPU of its actor on one node. `free`: free
    resources by node.
    """
    nodes = [{"CPU": r.get("CPU", 0.0), "GPU": r.get("GPU", 0.0)} for r in free.values()]
    aside, count = FETCHING + TRIAL_CPUS, 0
    while roomy := [n for n in nodes if n["CPU"] >= aside]:
        node = min(roomy, key=lambda n: fits(workers, n) - fits(workers, n, aside))
        node["CPU"] -= aside
        most = count + 1 if workers.placement == "strict_spread" else 1 << 30
        if sum(min(most, fits(workers, n)) for n in nodes) < (count + 1) * workers.most:
            break
        count += 1
    return count


def here(workers: Workers, cores: int) -> int:
    """Counts the trials that fit on this machine's `cores`, for a sweep that starts Ray itself. Returns at least 1. Returns 1 if
    workers need GPUs.

    The count ignores data tasks, because they mostly wait.
    """
    return 1 if workers.gpus else max(1, int(cores / (workers.most * workers.cpus) + 1e-6))
