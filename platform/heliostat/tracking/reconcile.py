"""Corrects a run's status in MLflow: what a driver that was killed could not write, the next command that sees the run writes.

The drivers' ledger tells which drivers are alive. A run whose driver is dead gets the metrics that still waited in its folder,
its checkpoints, data and goodput, and a status: FINISHED if its result is there, FAILED if its driver died without recording an
outcome, else what the ledger holds. KILLED is a run that somebody has stopped, or whose folder is gone.
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

STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # by outcomes after which a command ends
YOUNG_S = 60.0  # a run may be so old before its driver has written anything


def settle(client: MlflowClient, run: Run, how: str = "") -> Run:
    """Completes and closes the run in MLflow if it is RUNNING there but its driver is dead; returns the run as it is then.

    Writes to MLflow in no other case. `how`: what is known of the end of a driver that could not record it itself.
    """
    if run.info.status != "RUNNING":
        return run
    folder = Location(run.data.tags[tags.FOLDER])
    try:
        changed = _settle(client, run, folder, how)
    except (HeliostatError, OSError) as e:
        log.warning("can't find out from its folder whether run %s is over: %s", run.info.run_id, e)
        return run
    return client.get_run(run.info.run_id) if changed else run


def settle_folder(folder: Location, how: str = "") -> None:
    """Completes and closes the MLflow run of a run's folder if its driver is dead.

    Asks MLflow only where the folder shows that something may be left to do. `how`: what is known of the driver's end.
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
    log.warning("closed run %s in MLflow, because its driver is gone", run_id)
    return True


def _complete(client: MlflowClient, run_id: str, folder: Location) -> None:
    """Logs what the run's folder holds and MLflow lacks: metrics, goodput, checkpoints and data."""
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
