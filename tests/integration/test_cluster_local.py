"""A real cluster on this machine, as a person uses it: up, submit, look, stop at half, resume, down; and who may use it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from heliostat.cluster import http, jobs, local
from heliostat.storage import Location
from mlflow import MlflowClient

from tests.integration.conftest import curve, tiny_job

ROOT = Path(__file__).parents[2]
STEPS = 240


@dataclass
class Workspace:
    folder: Path
    file: Path  # of the cluster

    def heliostat(self, *arguments: str, code: int = 0) -> str:
        """Standard output of a command; fails, with what it said, on another exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "heliostat", *arguments], cwd=self.folder, env=_environment(), capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.heliostat(*arguments, "--json", code=code).splitlines()[-1])

    @property
    def state(self) -> local.State:
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            state = local.read("test")
            assert state
            state.token_file.stat()
            return local.State(state.name, state.file, state.url, state.nodes)
        finally:
            os.chdir(before)


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "platform"),
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, corpus: str, tracking: str) -> Iterator[Workspace]:
    """A workspace with clusters/local.yaml (other ports, so that it disturbs nobody), started; the tiny job beside it."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "clusters" / "local.yaml").read_text().replace("cluster_name: local", "cluster_name: test")
    for port in ("6389", "8275"):
        text = text.replace(port, str(_free_port()))
    (folder / "cluster.yaml").write_text(text)
    job = {**tiny_job(corpus, tracking, folder), "name": "onto", "workers": {"count": 2, "labels": {"heliostat-pool": "train"}}}
    job["data"] = {**job["data"], "labels": {"heliostat-pool": "train"}}
    job["train"] |= {"steps": STEPS, "log_every": 5}
    job |= {"checkpoint": {"every": 20}, "evaluate": {"every": STEPS, "samples": 24, "fraction": 0.05}}
    (folder / "onto.yaml").write_text(yaml.safe_dump(job))
    made = Workspace(folder, folder / "cluster.yaml")
    found = made.json("cluster", "up", "cluster.yaml")
    assert found["nodes"] == 3
    yield made
    if (folder / ".heliostat" / "clusters" / "test").exists():
        made.heliostat("cluster", "down", "test")


def test_the_nodes_are_those_of_the_file_and_up_again_starts_nothing(work) -> None:
    """Two workers with two CPUs each and the label that jobs ask for; a head that takes no work."""
    nodes = work.json("cluster", "status", "cluster.yaml")["nodes"]
    assert sorted((n["head"], n["cpus"], n["labels"].get("heliostat-pool")) for n in nodes) == [
        (False, 2, "train"), (False, 2, "train"), (True, 0, None)]  # fmt: skip
    before = work.state.nodes
    assert "3 nodes" in work.heliostat("cluster", "up", "cluster.yaml")
    assert work.state.nodes == before
    assert work.json("cluster", "list")["clusters"] == [{"name": "test", "url": work.state.url, "nodes": 3, "answers": True}]


def test_a_job_is_submitted_stopped_at_half_and_resumed_to_one_finished_run(work, tracking) -> None:
    run = Location(str(work.folder / "runs" / "onto"))
    sent = work.json("submit", "onto.yaml", "-c", "cluster.yaml")
    assert sent["id"] == "onto" and sent["run_folder"] == str(run)
    assert work.json("submit", "onto.yaml", "-c", "cluster.yaml")["id"] == "onto"  # the same job: the same submission
    work.heliostat("submit", "onto.yaml", "-c", "cluster.yaml", "--set", "train.seed=2", code=2)  # another: refused

    deadline = time.monotonic() + 150
    while not (step := jobs.progress(run, STEPS)["step"]) or step < 60:
        assert time.monotonic() < deadline, work.heliostat("logs", "onto")
        time.sleep(0.3)
    seen = work.json("status", "onto")
    assert seen["status"] == "RUNNING" and 60 <= seen["progress"]["step"] < STEPS and seen["progress"]["eta_s"] > 0
    stopped = work.json("stop", "onto")
    assert stopped["status"] == "STOPPED" and stopped["progress"]["step"] < STEPS
    assert "onto                     stopped" in work.heliostat("jobs", "-c", "cluster.yaml")
    work.heliostat("submit", "onto.yaml", "-c", "cluster.yaml", code=2)  # it says to use resume

    log = work.heliostat("resume", "onto", "--follow")
    assert f"step {STEPS}/{STEPS}" in log and "step 1/" not in log  # it went on, and the first submission's log is left out
    assert work.json("status", "onto")["progress"]["fraction"] == 1.0
    found = MlflowClient(tracking_uri=tracking).search_runs(
        [e.experiment_id for e in MlflowClient(tracking_uri=tracking).search_experiments()], "tags.mlflow.runName = 'onto'"
    )
    assert [r.info.status for r in found] == ["FINISHED"]
    assert len(curve(tracking, found[0].info.run_id)) == STEPS


def test_a_bad_job_ends_with_its_own_exit_code(work) -> None:
    """What only the driver finds on the cluster is bad input too: 2, with the line in the log; nothing was trained."""
    raw = yaml.safe_load((work.folder / "onto.yaml").read_text())
    (work.folder / "late.yaml").write_text(
        yaml.safe_dump({**raw, "name": "late", "data": {**raw["data"], "max_bad_fraction": 0.0}})
    )
    settings = ["--set", "data.sources.0.max_epochs=0.5", "--set", "train.steps=100000", "--set", "evaluate.every=100000"]
    out = subprocess.run(
        [sys.executable, "-m", "heliostat", "submit", "late.yaml", "-c", "cluster.yaml", "--follow", *settings],
        cwd=work.folder, env=_environment(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert out.returncode == 2 and "train.steps: 100000, but with max_epochs the data lasts for" in out.stdout + out.stderr


def _listening(state: local.State) -> set[tuple[str, int]]:
    found = set()
    for process in local._processes(state):
        for c in process.net_connections(kind="tcp"):
            if c.status == psutil.CONN_LISTEN:
                found.add(("127.0.0.1" if c.laddr.ip in ("0.0.0.0", "::") else c.laddr.ip, c.laddr.port))
    return found


def test_down_leaves_no_process_and_the_logs_stay(work) -> None:
    """The last test of the cluster: what was on it can still be read."""
    state = work.state
    ports = _listening(state)
    assert ports
    found = work.json("cluster", "down", "cluster.yaml")
    assert found["processes"] >= 6
    assert list(local._processes(state)) == [] and http.probe(state.url) == 0
    assert not Path(state.nodes[0].folder).parent.exists()
    assert re.search(rf"step {STEPS}/{STEPS}", work.heliostat("logs", "onto"))
    seen = work.json("status", "onto")
    assert seen["status"] == "UNKNOWN" and seen["progress"]["fraction"] == 1.0
    assert work.json("cluster", "list")["clusters"] == []
