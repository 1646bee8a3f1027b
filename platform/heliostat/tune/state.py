"""Manages the driver's state of a running sweep: the trials' records, the spent budget, and whether the sweep is stopping.

Ray Tune's callbacks update the state. heliostat immediately writes each change of a trial's status, reports, or clones to
storage.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from heliostat.config import workspace
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tracking.tags import PARENT_RUN, SOURCE_NAME, SWEEP, TRIAL
from heliostat.tune import space as spaces
from heliostat.tune import trial_record as records
from heliostat.tune.space import Params
from heliostat.tune.sweep import SweepPlan, holds, tell
from heliostat.tune.trial_record import Config, TrialRecord

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

Result = dict[str, Any]  # a trial's result, with the keys that Tune adds
log = logging.getLogger(__name__)


class SweepState:
    def __init__(self, plan: SweepPlan, before: list[TrialRecord], concurrency: int, parent: str, spent_s: float) -> None:
        """Starts from earlier commands' records (`before`) and seconds (`spent_s`). `parent`: id of the sweep's MLflow run."""
        self.plan, self.concurrency, self.parent = plan, concurrency, parent
        self.records = {r.number: r for r in before}
        self.trials: list[Trial] = []  # Tune's own list
        self.stopping = ""  # the reason to stop; empty if the sweep isn't stopping
        self.used_up = False  # whether the sweep stops because its budget is used up: it then counts as finished
        self._spent_s, self._began, self._ticked = spent_s, time.monotonic(), time.monotonic()
        self._ends: dict[int, Result] = {}  # last results of trials that ended by themselves

    @property
    def folder(self) -> Location:
        return self.plan.folder

    @property
    def seconds(self) -> float:
        """Returns the seconds that the sweep has run, summed over all commands that ran it."""
        return self._spent_s + time.monotonic() - self._began

    def of(self, trial_id: str) -> TrialRecord:
        return self.records[int(trial_id.rpartition("-")[2])]

    def busy(self) -> int:
        """Counts the trials that have workers, or will soon get workers."""
        return sum(t.status in ("PENDING", "RUNNING") for t in self.trials)

    def live(self) -> bool:
        return any(not t.is_finished() for t in self.trials)

    def config(self, record: TrialRecord) -> Config:
        """Builds the configuration that Ray Tune passes to the trial."""
        job = self.plan.job(record.number, record.params)
        last = record.clones[-1] if record.clones else None
        sweep = self.plan.sweep.name
        tags = {PARENT_RUN: self.parent, SWEEP: sweep, TRIAL: str(record.number), SOURCE_NAME: f"heliostat sweep run {sweep}"}
        return {
            "job": job.dump(),
            "pauses": holds(self.plan.sweep, job, record.number),
            "metric": self.plan.sweep.metric,
            "prunes": not self.plan.sweep.scheduler.exchanges,
            "clone": {"id": len(record.clones), "folder": last["folder"], "step": last["step"]} if last else None,
            "stop": str(self.folder.join("stop")),
            "tags": tags,
            "root": str(workspace.root()),
            "cluster": os.environ.get("RAY_ADDRESS", ""),
            "params": record.params,
        }

    # changes ---------------------------------------------------------------------------------------------------------

    def add(self, number: int, drawn: Params) -> TrialRecord:
        """Adds a new trial, and returns the trial's record. The status is `failed` if the parameters don't make a valid job."""
        space, params = self.plan.sweep.space, Params()
        for key, domain in space.items():
            if key in drawn and spaces.holds(domain, params):
                params[key] = drawn[key]
        record = TrialRecord(number, params, drawn)
        try:
            record.steps = self.plan.job(number, params).train.steps
        except ConfigError as e:
            record.status, record.reason = "failed", str(e)
        return self._keep(record)

    def started(self, trial_id: str) -> None:
        record = self.of(trial_id)
        if record.status != "running":
            log.info("trial %d  %s  %s", record.number, "continues" if record.step else "starts", tell(record.params))
            record.status = "running"
            self._keep(record)

    def record_result(self, trial_id: str, result: Result) -> None:
        """Updates a trial's record from a result: the step, after an evaluation the scores, and at the trial's end the
        outcome."""
        record = self.of(trial_id)
        step = int(result["step"])
        record.step = max(record.step, step)
        if "ended" in result:
            self._ends[record.number] = result
        if "waits" in result:
            log.warning("trial %d  %s", record.number, result["waits"])
        if scores := result.get("scores"):  # schedulers get results without scores
            record.scores = {k: float(v) for k, v in scores.items()}
        if "value" in result and (not record.reports or record.reports[-1][0] != step):
            record.reports.append((step, float(result["value"]), time.time()))
            log.info("trial %d  step %d/%d  %s %.4f", record.number, step, record.steps, self.plan.sweep.metric, result["value"])
        if "value" in result:
            self._keep(record)

    def ended(self, trial_id: str, error: bool) -> TrialRecord:
        record = self.of(trial_id)
        end = self._ends.get(record.number, {})
        record.status = end.get("ended") or ("failed" if error else "pruned")
        record.reason = end.get("reason") or ("its process died" if error else "")
        log.info(
            "trial %d  %s at step %d%s", record.number, record.status, record.step, f": {record.reason}" if record.reason else ""
        )
        return self._keep(record)

    def cloned(self, record: TrialRecord, donor: TrialRecord, step: int, params: Params) -> None:
        """Records that a trial continues from the donor's checkpoint of this step, with these parameters."""
        folder = str(self.folder.join("trials", self.plan.name(donor.number)))
        record.clones.append({"from": donor.number, "step": step, "at_step": record.step, "folder": folder,
                              "old": record.params, "params": params, "at": time.time()})  # fmt: skip
        log.info("trial %d  clones trial %d at step %d: %s", record.number, donor.number, step, tell(params))
        record.params, record.step = params, step
        self._keep(record)

    def tick(self) -> None:
        """Adds the time since the last call to the running time of trials. Stops the sweep if the budget is used up. Call this
        function about once per second."""
        now = time.monotonic()
        for trial in self.trials:
            record = self.of(trial.trial_id)
            if trial.status == "RUNNING":
                record.seconds += now - self._ticked
            elif trial.status == "PAUSED" and record.status == "running":
                record.status = "paused"
                self._keep(record)
        self._ticked = now
        budget = self.plan.sweep.budget
        if budget.hours is not None and self.seconds > 3600 * budget.hours:
            self.stop(f"budget.hours: the {budget.hours:g} hours are used up", used_up=True)
        if budget.gpu_hours is not None and self.gpu_hours > budget.gpu_hours:
            self.stop(f"budget.gpu_hours: the {budget.gpu_hours:g} GPU-hours are used up", used_up=True)

    def stop(self, why: str, used_up: bool = False) -> None:
        """Requests that every trial saves a checkpoint and stops. `why`: the reason; `used_up`: whether the budget is used
        up."""
        if not self.stopping:
            self.stopping, self.used_up = why, used_up
            log.warning("%s: trials stop after their next checkpoint. To continue the sweep, use --resume", why)
            self.folder.join("stop").write(why.encode())

    def _keep(self, record: TrialRecord) -> TrialRecord:
        record.tokens = record.step * self._per_step(record)
        self.records[record.number] = record
        records.write(self.folder, record)
        return record

    # the budget ------------------------------------------------------------------------------------------------------

    def _per_step(self, record: TrialRecord) -> float:
        batch = record.params.get("train.global_batch_size", self.plan.base["train"]["global_batch_size"])
        return float(spaces.number(batch) * self.plan.sample_tokens(record.params))

    @property
    def gpu_hours(self) -> float:
        workers = self.plan.base["workers"]
        return sum(r.seconds for r in self.records.values()) / 3600 * workers["gpus"] * workers["count"]

    def affords_another(self) -> bool:
        """Returns whether the token budget suffices for another complete trial, in addition to training all running trials to
        their last step."""
        limit = self.plan.sweep.budget.tokens
        if limit is None:
            return True
        promised = sum((r.step if r.over else r.steps) * self._per_step(r) for r in self.records.values())
        return promised + self.plan.tokens_per_trial <= limit
