"""Corrects a run's status in MLflow. If a run's driver was killed, the next command that reads the run writes the missing records
to MLflow.

The ledger shows which drivers are alive. If a run's driver is dead, MLflow gets the metrics that waited in the run's folder,
and the run's checkpoints, data, goodput, and status.

The status is FINISHED if the run has a result, and FAILED if its driver died without recording an outcome. In all other cases,
the status follows from the outcome in the ledger. A run is KILLED if a person stopped it, or if its folder is missing.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from heliostat.config.spec import Job
from heliostat.errors import HeliostatError
from heliostat.runs import goodput, liveness, summary
from heliostat.runs.mlflow_id import record
from heliostat.schema import validate
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Json
from heliostat.tracking import local_curves, mlflow_client, tags
from heliostat.tracking.outbox import Outbox
from heliostat.tracking.run_facts import RunRecord

if TYPE_CHECKING:  # importing MLflow takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # status by the outcome of a command
YOUNG_S = 60.0  # maximum time that a driver needs before it writes its first record


def settle(client: MlflowClient, run: Run, how: str = "") -> Run:
    """Completes and closes a run that is RUNNING in MLflow although its driver is dead. Returns the run with its new state in
    MLflow.

    For all other runs, writes nothing to MLflow. `how`: how the driver ended, if the driver couldn't record its end itself.
    """
    if run.info.status != "RUNNING":
        return run
    folder = Location(run.data.tags[tags.FOLDER])
    try:
        changed = _settle(client, run, folder, how)
    except (HeliostatError, OSError) as e:
        log.warning("can't read the run's folder, so the MLflow status of run %s doesn't change: %s", run.info.run_id, e)
        return run
    return client.get_run(run.info.run_id) if changed else run


def settle_folder(folder: Location, how: str = "") -> None:
    """Completes and closes the MLflow run of a run's folder if its driver is dead.

    Queries MLflow only if the folder shows that MLflow may lack something. `how`: how the driver ended, if that is known.
    """
    known = record(folder)
    last = liveness.last(folder)
    if "run_id" not in known or last is None:
        return
    if (last.outcome is None and not liveness.lives(last)) or folder.join(run_folder.UNLOGGED).exists():
        client = mlflow_client.connect(known["uri"])
        settle(client, client.get_run(known["run_id"]), how)


def _settle(client: MlflowClient, run: Run, folder: Location, how: str) -> bool:
    run_id, known, last = run.info.run_id, record(folder), liveness.last(folder)
    if known.get("run_id") != run_id and known.get("token") != tags.value(run.data.tags, tags.TOKEN):
        _end(client, run_id, "KILLED", f"its folder {folder} is missing, or belongs to another run", time.time())
        return True
    if last is None:
        if time.time() - run.info.start_time / 1000 < YOUNG_S:
            return False
        _end(client, run_id, "FAILED", "its driver died before it wrote anything", run.info.start_time / 1000)
        return True
    if last.outcome is None and liveness.lives(last):
        return False
    _complete(client, run_id, folder)
    if (status := STATUS.get(last.outcome or "")) is not None:
        _end(client, run_id, status, last.reason, last.seen)
    elif (summary.result(folder, last.reached) or {}).get("run_id") == run_id:
        _end(client, run_id, "FINISHED", "", last.seen)
    else:
        died = f"the driver (process {last.pid} on {last.host}) died without an error{how and f', {how}'}, at step "
        _end(client, run_id, "FAILED", f"{died}{last.reached}. --resume continues from its newest checkpoint", last.seen)
    log.warning("closed run %s in MLflow, because the run's driver is dead", run_id)
    return True


def _complete(client: MlflowClient, run_id: str, folder: Location) -> None:
    """Logs those records of the run's folder that aren't in MLflow yet: metrics, goodput, checkpoints, and data."""
    box = Outbox(folder, lambda p: mlflow_client.send(client, run_id, p), lambda: mlflow_client.known(client, run_id))
    box.precede(local_curves.missing(folder, mlflow_client.known(client, run_id)))
    box.flush()
    report = goodput.read_report(folder)
    mlflow_client.write_json(client, run_id, report, "goodput.json")
    job = mlflow_client.read_json(client, run_id, "job.json", dict[str, Json])
    if job is not None:
        RunRecord(client, run_id, validate(Job, job, f"run {run_id}: job.json")).sync(report["attempts"][-1]["reached"])


def _end(client: MlflowClient, run_id: str, status: str, reason: str, at: float) -> None:
    client.set_tag(run_id, tags.REASON, reason[:5000])
    client.set_terminated(run_id, status, end_time=int(at * 1000))
