"""Writes the sweep's own MLflow run from the driver's process. This run is the parent of the trials' runs.

Each trial writes its own run. The parent run contains the sweep's file, the table of trials, the plots, PBT's lineage, and the
best model. If MLflow is busy or unreachable, calls are retried for AWAY_S seconds. If MLflow stays unreachable, the next
`heliostat sweep run --resume` writes the missing parts.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from heliostat.cluster import source_code
from heliostat.errors import TrackingError
from heliostat.runs.mlflow_id import record
from heliostat.storage.locations import Location
from heliostat.storage.retries import Backoff, FailedAttempts, retry
from heliostat.text import brief
from heliostat.tracking import mlflow_client, tags
from heliostat.tracking.run_facts import params_of
from heliostat.tune import report
from heliostat.tune.sweep import SweepPlan
from heliostat.tune.trial_record import TrialRecord, best

log = logging.getLogger(__name__)

AWAY_S = 60.0  # seconds to retry a call of MLflow
BACKOFF = Backoff(0.2, 5.0)
T = TypeVar("T")
STATUS = {"finished": "FINISHED", "failed": "FAILED"}  # status of a trial's run in MLflow; KILLED for other statuses


class Parent:
    """Holds the sweep's MLflow run. `Parent(plan, run_id)` creates a run if `run_id` is empty."""

    def __init__(self, plan: SweepPlan, run_id: str) -> None:
        mlflow_client.set_client()
        import mlflow

        self.plan, self.uri = plan, plan.base["mlflow"]["uri"]
        self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        self.run_id = run_id or self._create()
        self._do(lambda: self.client.update_run(self.run_id, status="RUNNING"))

    def _do(self, action: Callable[[], T]) -> T:
        """Runs an action. If MLflow fails, retries the action, because other processes write to the same store. Raises
        TrackingError after AWAY_S seconds."""

        def give_up(failure: FailedAttempts) -> NoReturn:
            raise TrackingError(
                f"mlflow.uri: {self.uri} failed ({brief(failure.error)}). When MLflow answers, run the sweep again with --resume"
            ) from failure.error

        return retry(action, AWAY_S, BACKOFF, lambda error: None, give_up)  # MLflow passes on any error of its store

    def _create(self) -> str:
        name, sweep = self.plan.base["mlflow"]["experiment"], self.plan.sweep
        experiment = self._do(lambda: mlflow_client.experiment(self.client, self.uri, name))
        facts = {
            tags.SWEEP: sweep.name,
            tags.SWEEP_FOLDER: str(self.plan.folder),
            tags.USER: source_code.user(),
            tags.SOURCE_NAME: f"heliostat sweep run {sweep.name}",
            tags.SOURCE_TYPE: "JOB" if os.environ.get("HELIOSTAT_CLUSTER") else "LOCAL",
            tags.NOTE: report.note(self.plan),
        }
        if commit := source_code.source().commit:
            facts[tags.COMMIT] = commit
        run_id = self._do(lambda: self.client.create_run(experiment, run_name=sweep.name, tags=facts).info.run_id)
        from mlflow.entities import Param

        params = [Param(k, v) for k, v in params_of(sweep.dump()).items()]
        self._do(lambda: self.client.log_batch(run_id, params=params))
        self._do(lambda: self.client.log_dict(run_id, {"sweep": sweep.dump(), "job": self.plan.base}, "sweep.json"))
        return run_id

    def settle(self, records: list[TrialRecord]) -> None:
        """Sets the MLflow status and tags of each trial's run from the trial's record, because a trial whose process died
        couldn't set them.

        Writes the ids of these MLflow runs into the records.
        """
        for trial in records:
            known = record(self.trial(trial))
            if "run_id" not in known:
                continue  # the trial never reached its first step
            trial.run_id = known["run_id"]
            run = self._do(lambda known=known: self.client.get_run(known["run_id"]))  # type: ignore[misc]
            wanted = STATUS.get(trial.status, "KILLED")
            if run.info.status != wanted:
                self._do(lambda run=run, wanted=wanted: self.client.set_terminated(run.info.run_id, wanted))  # type: ignore[misc]
            facts = {tags.STATUS: trial.status}
            facts |= {tags.PRUNED: f"step {trial.step}"} if trial.status == "pruned" else {}
            facts |= {tags.CLONES: json.dumps(trial.clones)[:5000]} if trial.clones else {}
            for key, value in facts.items():
                if run.data.tags.get(key) != value:
                    self._do(lambda run=run, k=key, v=value: self.client.set_tag(run.info.run_id, k, v))  # type: ignore[misc]

    def trial(self, record: TrialRecord) -> Location:
        return self.plan.folder.join("trials", self.plan.name(record.number))

    def close(self, status: str, reason: str, records: list[TrialRecord], model_uri: str | None) -> None:
        """Logs the table of trials, PBT's lineage, the plots, and the outcome, and ends the sweep's run."""
        sweep = self.plan.sweep
        rows = report.rows(self.plan, records)
        columns = {key: [row.get(key) for row in rows] for key in report.columns(rows)}
        if rows:
            self._do(lambda: self.client.log_table(self.run_id, columns, f"trials-{time.strftime('%Y%m%dT%H%M%S')}.json"))
        self._do(lambda: self.client.log_dict(self.run_id, {"trials": rows}, "trials.json"))
        lineage = [{"trial": r.number, **c} for r in records for c in r.clones]
        if lineage:
            self._do(lambda: self.client.log_dict(self.run_id, {"clones": lineage}, "lineage.json"))
        for name, figure in report.figures(self.plan, records).items():
            self._do(lambda name=name, figure=figure: self.client.log_figure(self.run_id, figure, name))  # type: ignore[misc]
        facts = {tags.REASON: reason} if reason else {}
        if (first := best(records, sweep.mode)) and (score := first.value) is not None:
            facts |= {tags.BEST_TRIAL: str(first.number), tags.BEST_RUN: first.run_id}
            facts |= {tags.MODEL_URI: model_uri} if model_uri else {}
            self._do(lambda: self.client.log_metric(self.run_id, f"best/{sweep.metric}", score))
        for key, value in facts.items():
            self._do(lambda k=key, v=value: self.client.set_tag(self.run_id, k, v))  # type: ignore[misc]
        self._do(lambda: self.client.set_terminated(self.run_id, status))

    def mark_model(self, model_uri: str, number: int) -> None:
        """Tags a registered model's version with the sweep, its MLflow run, and the trial that trained the model."""
        if not model_uri.startswith("models:/") or model_uri.count("/") != 2:
            return
        name, version = model_uri.removeprefix("models:/").split("/")
        facts = {tags.SWEEP: self.plan.sweep.name, tags.SWEEP_RUN: self.run_id, tags.TRIAL: str(number)}
        for key, value in facts.items():
            self._do(lambda k=key, v=value: self.client.set_model_version_tag(name, version, k, v))  # type: ignore[misc]
