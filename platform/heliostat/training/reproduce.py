"""Reproduces a recorded run from its MLflow record, and compares the two loss curves step by step.

The job, its seeds, and the dataset versions come from the record. The code is the workspace's current code; heliostat compares
this code with the code of the recorded run. In fp32, the curves are bitwise equal if the machine, packages, code, and worker
counts are the same. The new run, NAME-again, is separate from the recorded run, and registers no model.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.cluster import source_code
from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.runs import consumed
from heliostat.runs.goodput import Outline
from heliostat.storage.run_folder import ATTEMPTS
from heliostat.tracking import mlflow_client, tags
from heliostat.tracking.lineage import attempts, data_of
from heliostat.tracking.mlflow_client import read_json
from heliostat.tracking.run_facts import RecordedStart

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedRun:
    """Holds a run's MLflow record. `plan`: the data plan of its first segment. `end`: the last step of that segment. `curve`:
    loss by step, from 1."""

    run_id: str
    job: dict[str, Any]
    plan: Any
    end: int
    curve: dict[int, float]
    starts: list[RecordedStart]
    environment: dict[str, str]
    attempts: list[Outline]


def reproduce(client: Any, uri: str, run: str, steps: int | None, settings: list[str], overwrite: bool) -> dict[str, Any]:
    """Trains the run's first `steps` steps again, and reports the differences.

    Trains the run's complete first segment if `steps` is None.

    Returns both run ids, the `notes` about differing code and packages, and the result of `compare`. Raises ConfigError if
    `steps` is after the end of the segment.
    """
    from heliostat.training.run import train

    mlflow_run = mlflow_client.find(client, run, uri)
    recorded = read(client, mlflow_run)
    count = min(steps or recorded.end, recorded.end)
    if steps and steps > recorded.end:
        raise ConfigError(
            f"--steps {steps}: the run's record ends at step {recorded.end}, where the run ended or the run's data changed. "
            "Pass this step or an earlier step"
        )
    notes = differences(recorded, source_code.source(), source_code.environment())
    for note in notes:
        log.warning("%s", note)
    job = again(recorded, count)
    with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        result = train(
            path,
            settings,
            overwrite=overwrite,
            recorded=recorded.plan,
            tags={tags.REPRODUCES: recorded.run_id, tags.SOURCE_NAME: f"heliostat debug reproduce {recorded.run_id}"},
        )
    curve = read_curve(client, result["run_id"])
    return {"run_id": recorded.run_id, "again": result["run_id"], "notes": notes, **compare(recorded.curve, curve, count)}


def read(client: Any, run: Any) -> RecordedRun:
    """Reads a run's record from MLflow. Raises ConfigError if the record is too incomplete to reproduce the run."""
    run_id = run.info.run_id
    job, data, starts = (
        read_json(client, run_id, "job.json", dict[str, Any]),
        data_of(client, run),
        read_json(client, run_id, ATTEMPTS, list[RecordedStart]),
    )
    if job is None or not data["segments"] or not starts:
        raise ConfigError(
            f"run {run_id}: the record in MLflow has no job, data, or machines, because the run ended before its first "
            "checkpoint. Reproduce another run"
        )
    first = consumed.parse(data)[0]
    environment = read_json(client, run_id, f"code/environment-{starts[0]['environment']}.json", dict[str, str]) or {}
    return RecordedRun(run_id, job, first.plan, first.end, read_curve(client, run_id), starts, environment, attempts(client, run))


def read_curve(client: Any, run_id: str) -> dict[int, float]:
    return {m.step: m.value for m in client.get_metric_history(run_id, "train/loss")}


def again(recorded: RecordedRun, steps: int) -> dict[str, Any]:
    """Builds the job of the new run: the recorded job with its first number of workers, up to step `steps`."""
    job = spec.with_rules(json.loads(json.dumps(recorded.job)))
    job["name"] = f"{job['name'][:94]}-again"
    job["train"]["stop_after"] = steps
    job["workers"]["count"] = recorded.attempts[0]["workers"] if recorded.attempts else recorded.starts[0]["workers"]
    job["mlflow"] |= {"register": None, "alias": None}
    return Job.model_validate(job).dump()


def differences(recorded: RecordedRun, source: source_code.SourceCode, environment: dict[str, str]) -> list[str]:
    """Lists the differences between the recorded and the current code and environment, and the parts of the run that aren't
    reproduced. One line each."""
    was, notes = recorded.starts[0]["code"], []
    now = source.facts()
    if was["commit"] != now["commit"]:
        notes.append(f"code: the run used commit {was['commit'] or 'unknown'}; now it is {now['commit'] or 'unknown'}")
    if was["diff"] != now["diff"]:
        diff_place = f"code/{was['diff']}.diff in the run's artifacts" if was["diff"] else "none"
        notes.append(f"code: the uncommitted changes differ (in the recorded run: {diff_place}; now: {now['diff'] or 'none'})")
    for name in sorted(recorded.environment.keys() | environment.keys()):
        before, here = recorded.environment.get(name, "absent"), environment.get(name, "absent")
        if before != here:
            notes.append(f"environment: {name} {before} then, {here} now")
    counts = sorted({a["workers"] for a in recorded.attempts})
    if len(counts) > 1:
        notes.append(
            f"workers: the run used {', '.join(map(str, counts))} workers, and this run uses another number, so sums "
            f"are rounded in another order"
        )
    changed = {key for start in recorded.starts for key in start["changes"]} - {"workers.count"}
    if changed:
        notes.append(f"job: the run later continued with other settings ({', '.join(sorted(changed))}), which are not reproduced")
    return notes


def compare(recorded: dict[int, float], curve: dict[int, float], steps: int) -> dict[str, Any]:
    """Compares the losses of steps 1 to `steps`. Returns {steps, bitwise, first_difference, largest_difference}.

    Raises ConfigError if one of the two curves lacks a step.
    """
    both = [s for s in range(1, steps + 1) if s in recorded and s in curve]
    if len(both) < steps:
        missing = next(s for s in range(1, steps + 1) if s not in recorded or s not in curve)
        raise ConfigError(
            f"step {missing}: MLflow has no loss of this step for one of the two runs, so the runs can't be compared. "
            "Pass --steps below this step"
        )
    gaps = {s: abs(recorded[s] - curve[s]) for s in both}
    first = next((s for s in both if recorded[s] != curve[s]), None)
    largest = max(gaps.values(), key=lambda g: math.inf if math.isnan(g) else g)
    return {"steps": steps, "bitwise": first is None, "first_difference": first, "largest_difference": largest}
