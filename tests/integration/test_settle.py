"""Tests that a run that is RUNNING in MLflow, but dead, gets the status of its folder from the next process that sees it."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.run_folder import LEDGER, RESULT
from heliostat.tracking import mlflow_client
from heliostat.tracking.reconcile import YOUNG_S, settle, settle_folder
from heliostat.tracking.tags import FOLDER as RUN_FOLDER
from heliostat.tracking.tags import NAME, TOKEN

Scene = Callable[..., tuple[Any, str]]
GONE = 2**22 + 1  # no process has this number


@pytest.fixture
def scene(tracking: str, tmp_path: Path) -> Scene:
    """Returns (client, run id) of a RUNNING run whose folder has one attempt, with these facts and this record of it."""

    def make(record: dict[str, Any] | None = None, **facts: Any) -> tuple[Any, str]:
        client = mlflow_client.connect(tracking)
        name = f"settle-{tmp_path.name}"
        found = client.get_experiment_by_name(name)
        place = str(tmp_path / "artifacts")
        experiment = found.experiment_id if found else client.create_experiment(name, artifact_location=place)
        tags = {NAME: name, RUN_FOLDER: str(tmp_path / "run"), TOKEN: "mine"}
        run_id = client.create_run(experiment, tags=tags).info.run_id
        folder, now = Location(str(tmp_path / "run")), time.time()
        attempt = RecordedAttempt("a", now - 50, now - 40, now - 30, 0, 2, host=socket.gethostname(), pid=GONE)
        for key, value in facts.items():
            setattr(attempt, key, value)
        folder.join(LEDGER, "attempt-1.json").write(attempt.dump())
        told = {"run_id": run_id, "uri": tracking, "token": "mine"} if record is None else record
        folder.join(run_folder.MLFLOW_RUN).write(json.dumps(told).encode())
        return client, run_id

    return make


@pytest.mark.parametrize(
    ("outcome", "reason", "status", "said"),
    [
        (None, "", "FAILED", "died without an error"),
        ("failed", "a shard is gone", "FAILED", "a shard is gone"),
        ("interrupted", "stopped by SIGTERM", "KILLED", "stopped by SIGTERM"),
        ("finished", "", "FINISHED", ""),
        ("resize", "", "FAILED", "died without an error"),  # it was to go on
    ],
)
def test_a_dead_drivers_run_gets_the_status_of_its_ledger(scene, tmp_path, outcome, reason, status, said):
    client, run_id = scene(outcome=outcome, reason=reason)
    run = settle(client, client.get_run(run_id))
    assert run.info.status == status and said in run.data.tags["heliostat.reason"]
    assert run.info.end_time == pytest.approx((time.time() - 30) * 1000, abs=20_000)  # when it was last seen
    assert "goodput.json" in {f.path for f in client.list_artifacts(run_id)}
    assert settle(client, run) is run  # once


def test_what_waited_for_mlflow_in_the_folder_is_logged(scene, tmp_path):
    client, run_id = scene(outcome="finished")
    lines = [json.dumps(["train/loss", 5.0 - s, 1e9 + s, s]) + "\n" for s in (1, 2, 3)]
    Location(str(tmp_path / "run")).join(run_folder.UNLOGGED).write("".join(lines).encode())
    settle_folder(Location(str(tmp_path / "run")))
    assert sorted(m.step for m in client.get_metric_history(run_id, "train/loss")) == [1, 2, 3]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not Location(str(tmp_path / "run")).join(run_folder.UNLOGGED).exists()


def test_a_living_drivers_run_is_left_alone(scene):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        client, run_id = scene(pid=other.pid, started=time.time() + 1)
        assert settle(client, client.get_run(run_id)).info.status == "RUNNING"
        client, run_id = scene(host="another", seen=time.time())  # gave a sign of life from another host
        assert settle(client, client.get_run(run_id)).info.status == "RUNNING"
        client, run_id = scene(host="another", seen=time.time() - 600)
        assert settle(client, client.get_run(run_id)).info.status == "FAILED"
    finally:
        other.kill()
        other.wait()


def test_a_run_whose_folder_is_another_runs_is_over(scene):
    client, run_id = scene(record={"run_id": "f" * 32, "token": "another's", "uri": "sqlite:///x"})
    run = settle(client, client.get_run(run_id))
    assert run.info.status == "KILLED" and "another run" in run.data.tags["heliostat.reason"]


def test_a_driver_that_died_before_it_wrote_the_runs_id_down_is_found_by_its_token(scene, tmp_path):
    client, run_id = scene(record={"token": "mine", "uri": "sqlite:///x"})
    assert "died without an error" in settle(client, client.get_run(run_id)).data.tags["heliostat.reason"]


def test_a_run_that_has_only_begun_is_given_time(scene, tmp_path, monkeypatch):
    client, run_id = scene()
    Location(str(tmp_path / "run")).join(LEDGER).delete()
    assert settle(client, client.get_run(run_id)).info.status == "RUNNING"
    monkeypatch.setattr("heliostat.tracking.reconcile.YOUNG_S", -1.0)
    assert YOUNG_S > 0 and settle(client, client.get_run(run_id)).info.status == "FAILED"


def test_a_driver_that_died_behind_its_result_has_finished_its_run(scene, tmp_path):
    """Only MLflow lacked the end. The result of an earlier, shorter training doesn't count."""
    for steps, status in ((20, "FINISHED"), (10, "FAILED")):
        client, run_id = scene(marks=[(20, 3.0)])
        Location(str(tmp_path / "run")).join(RESULT).write(json.dumps({"steps": steps, "run_id": run_id}).encode())
        assert settle(client, client.get_run(run_id)).info.status == status


def test_what_is_known_of_a_drivers_end_is_part_of_the_reason(scene, tmp_path):
    client, run_id = scene(marks=[(7, 3.0)])
    settle_folder(Location(str(tmp_path / "run")), how="killed by SIGKILL")
    reason = client.get_run(run_id).data.tags["heliostat.reason"]
    assert "died without an error, killed by SIGKILL, at step 7" in reason
