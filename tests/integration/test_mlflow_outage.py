"""Tests a training during which MLflow becomes unreachable: it continues, and every metric arrives once, whenever the server is
back."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from heliostat.chaos.servers import ServerProcess
from heliostat.errors import TrackingError
from heliostat.runs.events import Steps
from heliostat.runs.goodput import PARTS
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.retries import Backoff
from heliostat.tracking import logger as tracking_run
from heliostat.tracking.logger import RunOwner
from heliostat.validation.check import check, load_job
from mlflow import MlflowClient

from tests.integration import commands
from tests.integration.conftest import curve, empty_store
from tests.waiting import until

REPORT: dict[str, Any] = {"total_s": 1.0, "goodput": 1.0, "worker_hours": 0.1}


class ForkedServer(ServerProcess):
    """Runs MLflow's server, each time in a fork with its libraries imported."""

    def __init__(self, store: str, folder: Path) -> None:
        super().__init__([*("", "", "MLflow"), store, str(folder), "PORT"], "/health", folder / "mlflow-server.log")

    def _launch(self) -> Any:
        return commands.call(f"{__name__}:serve", *self._command[3:], log=self._log)


def serve(given: list[str]) -> int:
    """Does the work of `mlflow server` with one worker, in this process."""
    import uvicorn
    from mlflow import server

    store, folder, port = given
    os.environ |= {
        server.BACKEND_STORE_URI_ENV_VAR: store, server.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        server.SERVE_ARTIFACTS_ENV_VAR: "true", server.ARTIFACTS_DESTINATION_ENV_VAR: f"{folder}/artifacts",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # fmt: skip
    uvicorn.run("mlflow.server.fastapi_app:app", host="127.0.0.1", port=int(port))
    return 0


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns a separate store, because a client without the server can't write artifacts to an experiment that was created
    through it."""
    return empty_store(tmp_path_factory)


@pytest.fixture
def server(tracking: str, tmp_path: Path):
    with ForkedServer(tracking, tmp_path) as running:
        yield running


@pytest.fixture
def owner_of(server: ServerProcess, job_file, monkeypatch):
    """Returns a new command's owner of the run."""
    monkeypatch.setattr(tracking_run, "AWAY_S", 3.0)
    monkeypatch.setattr(tracking_run, "PAUSES", Backoff(0.5, 1.0))
    checked = check(load_job(job_file("outage"), [f"mlflow.uri=http://{server.endpoint}", "mlflow.experiment=outage"]))
    return lambda: RunOwner(checked.job, checked.manifests), checked.job.run_folder


def steps(first: int, last: int) -> Steps:
    values = [s / 10 for s in range(first, last)]
    return Steps(first=first - 1, loss=values, lr=values, grad_norm=values, seconds=1.0)


def ended(first: int, last: int) -> dict[str, Any]:
    bar = {"parts": dict.fromkeys(PARTS, 1.0), "before": {}, "reached": last, "start_step": first - 1, "started": time.time(),
           "seconds": 1.0, "workers": 2, "outcome": "finished", "reason": "", "restart": False}  # fmt: skip
    return {**REPORT, "parts": dict.fromkeys(PARTS, 1.0), "attempts": [bar]}


def run_of(folder: Location) -> str:
    return json.loads(folder.join("run.json").read())["run_id"]


def has(tracking: str, folder: Location, step: int) -> bool:
    file = folder.join("run.json")
    if not file.exists() or "run_id" not in json.loads(file.read()):  # a token is written before
        return False
    return step in [m.step for m in MlflowClient(tracking_uri=tracking).get_metric_history(run_of(folder), "train/loss")]


@pytest.mark.ci
def test_metrics_wait_for_the_server_through_attempts_and_commands_and_arrive_once(server, owner_of, tracking, caplog):
    make, run = owner_of
    owner = make()
    owner.post(steps(1, 11))
    until(lambda: has(tracking, run, 10), "step 10 in MLflow")
    run_id = run_of(run)
    server.stop()
    began = time.monotonic()
    owner.post(steps(11, 16))
    owner.post(steps(13, 21))  # an attempt that went back
    assert time.monotonic() - began < 5  # nothing waits for MLflow, which its client asks for two minutes
    server.start()
    until(lambda: "MLflow answers again" in caplog.text, "word of the server's return")
    assert "MLflow doesn't accept metrics" in caplog.text and has(tracking, run, 20)
    assert not run.join(run_folder.UNLOGGED).exists()
    server.stop()
    owner.post(steps(21, 26))
    with pytest.raises(TrackingError, match=r"didn't accept the run's metrics for 3 s .*unlogged\.jsonl\. To log these metrics"):
        owner.finish("FINISHED", "", ended(1, 25))
    assert run.join(run_folder.UNLOGGED).exists()
    server.start()
    later = make()
    later.post(steps(24, 31))  # resumed from an older checkpoint
    later.finish("FINISHED", "", ended(1, 30))
    assert curve(tracking, run_id) == [s / 10 for s in range(1, 31)]
    found = MlflowClient(tracking_uri=tracking).get_run(run_id)
    assert found.info.status == "FINISHED" and later.run_id == run_id and not run.join(run_folder.UNLOGGED).exists()


def test_an_mlflow_that_never_answers_does_not_hide_why_a_run_failed(job_file, monkeypatch, caplog):
    """MLflow didn't even open the run: the folder has all of it, for the next command."""
    monkeypatch.setattr(tracking_run, "AWAY_S", 3.0)
    checked = check(load_job(job_file("nowhere")))
    job = checked.job.model_copy(update={"mlflow": checked.job.mlflow.model_copy(update={"uri": "http://127.0.0.1:9"})})
    owner = RunOwner(job, checked.manifests)
    owner.post(steps(1, 5))
    owner.finish("FAILED", "a worker failed", ended(1, 4))
    assert "didn't accept the run's metrics for 3 s" in caplog.text
    lines = [json.loads(line) for line in job.run_folder.join(run_folder.UNLOGGED).read().splitlines()]
    assert [step for key, _, _, step in lines if key == "train/loss"] == [1, 2, 3, 4]


def test_a_driver_that_dies_before_the_runs_id_is_written_down_leaves_no_second_run(job_file, tracking):
    """The folder then has only the token with which the run was created. The next command finds the run by it."""
    checked = check(load_job(job_file("twice"), ["mlflow.experiment=twice"]))  # its artifacts go past the server
    ids = set()
    for last in (10, 20):
        owner = RunOwner(checked.job, checked.manifests)
        owner.post(steps(1, last + 1))
        owner.finish("FINISHED", "", ended(1, last))
        place = checked.job.run_folder.join("run.json")
        told = json.loads(place.read())
        ids.add(told.pop("run_id"))
        place.write(json.dumps(told).encode())
    (run_id,) = ids
    assert curve(tracking, run_id) == [s / 10 for s in range(1, 21)]
    assert "report.html" in {f.path for f in MlflowClient(tracking_uri=tracking).list_artifacts(run_id)}
