"""Tests a real cluster on this machine as a person uses it: up, submit, status, stop halfway, resume, down; and its access
control."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import requests
import yaml
from heliostat.chaos.servers import s3_server
from heliostat.cli.main import app
from heliostat.cluster import dashboard, local
from heliostat.cluster.endpoint import Endpoint, _answering
from heliostat.cluster.processes import free_port
from heliostat.errors import ClusterError, HeliostatError
from heliostat.storage.locations import Location
from heliostat.submit import jobs, progress
from heliostat.tune import trial_record
from mlflow import MlflowClient
from typer.testing import CliRunner

from tests.integration import paced
from tests.integration.conftest import curve, tiny_job
from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model
from tests.waiting import until

pytestmark = [
    pytest.mark.ci,
    pytest.mark.timeout(1500),
]  # whose workers and drivers are new processes: a job starts in a minute or more
ROOT = Path(__file__).parents[2]
LONG_S = 600.0  # for a job, a trial, or an endpoint to start
STEPS = 40


@dataclass
class Workspace:
    folder: Path
    file: Path  # of the cluster

    def heliostat(self, *arguments: str, code: int = 0) -> str:
        """Returns a command's output; fails with the output on another exit code. Runs in this process, because imports take
        longer than commands."""
        with contextlib.chdir(self.folder):
            done = CliRunner().invoke(app, list(arguments))
        error = done.exception
        ended = error.exit_code if isinstance(error, HeliostatError) else done.exit_code
        assert ended == code, f"{arguments}: exit code {ended}\n{done.output[-3000:]}\n{error!r}"
        return done.output + (str(error) if error else "")

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.heliostat(*arguments, "--json", code=code).splitlines()[-1])

    def run(self, log: Path, *arguments: str) -> int:
        """Runs a command as a process; returns its exit code."""
        with self.started(log, *arguments) as process:
            return process.wait(LONG_S)

    def started(self, log: Path, *arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "RAY_ADDRESS": ""}
        with log.open("a") as out:
            words = [sys.executable, "-m", "heliostat", *arguments]
            return subprocess.Popen(words, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def served(self, model: Path, port: int, log: Path) -> subprocess.Popen:
        """Serves a model on the cluster, as `tiny`."""
        words = ("model", "serve", str(model), "--cluster", "test", "--port", str(port), "--no-keys", "--name", "tiny")
        process = self.started(log, *words)
        until(lambda: "tiny is served at" in log.read_text(), "endpoint", LONG_S, lambda: process.poll() is None, log.read_text)
        return process

    def trains(self, name: str, run: Location, least: int = 1) -> None:
        """Waits until a run has reached a step."""
        until(lambda: (progress.of_run(run, STEPS)["step"] or 0) >= least, f"step {least}", LONG_S,
              said=lambda: self.heliostat("job", "logs", name))  # fmt: skip

    @property
    def token(self) -> str:
        return (self.folder / ".heliostat" / "clusters" / "test" / "token").read_text()

    @property
    def state(self) -> local.ClusterState:
        with contextlib.chdir(self.folder):
            state = local.read("test")
        assert state
        return state


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, corpus: str, tracking: str) -> Iterator[Workspace]:
    """Starts a cluster in a workspace with clusters/local.yaml (with other ports, so that it disturbs no other cluster), and the
    tiny job."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(str(paced.__file__), folder / "jobs" / "paced.py")
    text = (ROOT / "clusters" / "local.yaml").read_text().replace("cluster_name: local", "cluster_name: test")
    for port in ("6389", "6390", "8275"):
        text = text.replace(port, str(free_port()))
    (folder / "cluster.yaml").write_text(text)
    job = {**tiny_job(corpus, tracking, folder), "name": "onto", "recipe": "jobs.paced:PacedPlain"}
    job["workers"] = {"count": 2, "labels": {"heliostat-pool": "train"}}
    job["data"] = {**job["data"], "labels": {"heliostat-pool": "train"}}
    job["train"] |= {"steps": STEPS, "log_every": 5}
    job |= {"checkpoint": {"every": 10}, "evaluate": {"every": STEPS, "samples": 24, "fraction": 0.05}}
    (folder / "onto.yaml").write_text(yaml.safe_dump(job))
    made = Workspace(folder, folder / "cluster.yaml")
    found = made.json("cluster", "up", "cluster.yaml")
    assert found["nodes"] == 3
    yield made
    if (folder / ".heliostat" / "clusters" / "test").exists():
        made.heliostat("cluster", "down", "test")


def test_the_nodes_are_those_of_the_file_and_up_again_starts_nothing(work) -> None:
    """Two workers with two CPUs each and the label of the jobs, and a head without work."""
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

    work.trains("onto", run, 10)
    seen = work.json("job", "status", "onto")
    assert seen["status"] == "RUNNING" and 10 <= seen["progress"]["step"] < STEPS and seen["progress"]["eta_s"] > 0
    stopped = work.json("job", "stop", "onto")
    assert stopped["status"] == "STOPPED" and stopped["progress"]["step"] < STEPS
    assert re.search(r"\bonto +stopped\b", work.heliostat("job", "list", "-c", "cluster.yaml"))
    work.heliostat("submit", "onto.yaml", "-c", "cluster.yaml", code=2)  # it says to use resume

    log = work.heliostat("job", "resume", "onto", "--follow")
    assert f"step {STEPS}/{STEPS}" in log and "step 1/" not in log  # it went on, and the first submission's log is left out
    assert work.json("job", "status", "onto")["progress"]["fraction"] == 1.0
    found = MlflowClient(tracking_uri=tracking).search_runs(
        [e.experiment_id for e in MlflowClient(tracking_uri=tracking).search_experiments()], "tags.mlflow.runName = 'onto'"
    )
    assert [r.info.status for r in found] == ["FINISHED"]
    assert len(curve(tracking, found[0].info.run_id)) == STEPS


def test_a_bad_job_ends_with_its_own_exit_code(work) -> None:
    """A fault that only the driver on the cluster finds is bad input, too: code 2, with the line in the log, and without
    training."""
    raw = yaml.safe_load((work.folder / "onto.yaml").read_text())
    (work.folder / "late.yaml").write_text(yaml.safe_dump({**raw, "name": "late"}))
    settings = ["--set", "data.sources.0.max_epochs=0.5", "--set", "train.steps=100000", "--set", "evaluate.every=100000"]
    out = work.heliostat("submit", "late.yaml", "-c", "cluster.yaml", "--follow", *settings, code=2)
    assert "train.steps: the data lasts for" in out


def test_up_starts_the_worker_that_died_and_leaves_what_runs(work) -> None:
    """A job continues on the head and the other worker. Only --restart would end them."""
    head, first, second = before = work.state.nodes
    client = jobs.Jobs(Endpoint(work.state.url, work.token, True)).client
    client.submit_job(entrypoint="sleep 1200", submission_id="sleeper")
    until(lambda: client.get_job_status("sleeper") == "RUNNING", "the job", LONG_S)
    for process in family(local.ClusterState("", "", "", [second])):
        process.kill()
    found = work.json("cluster", "up", "cluster.yaml")
    assert found["nodes"] == 3 and work.state.nodes[:2] == [head, first] and work.state.nodes[2] not in before
    assert head.process and first.process
    nodes = [n for n in work.json("cluster", "status", "test")["nodes"] if n["address"] == second.address]
    assert len({n["id"] for n in nodes}) == 2  # the one that died, and another
    assert client.get_job_status("sleeper") == "RUNNING"
    client.stop_job("sleeper")


@pytest.mark.slow  # what it adds to the driver's own test is Ray's part in it
def test_a_job_whose_store_is_dead_is_stopped_now(work, tmp_path) -> None:
    """The job is STOPPED within seconds. The note for the driver is removed, and appears in no list."""
    raw = yaml.safe_load((work.folder / "onto.yaml").read_text())
    raw |= {"name": "dead", "checkpoint": {"every": 100000}}
    raw["train"] |= {"steps": 100000}
    raw["evaluate"]["every"] = 100000
    with s3_server(tmp_path) as store:
        raw["storage"] = f"s3://bucket/runs?endpoint_override={store.endpoint}&scheme=http"
        urllib.request.urlopen(urllib.request.Request(f"http://{store.endpoint}/bucket", method="PUT"), timeout=60).close()
        (work.folder / "dead.yaml").write_text(yaml.safe_dump(raw))
        run = Location(work.json("submit", "dead.yaml", "-c", "cluster.yaml")["run_folder"])
        work.trains("dead", run)
    began = time.monotonic()
    assert work.json("job", "stop", "dead", "--now")["status"] == "STOPPED"
    assert time.monotonic() - began < 60
    assert [j["id"] for j in work.json("job", "list", "-c", "cluster.yaml")["jobs"]].count("dead") == 1
    assert not any(j["id"].startswith("stop-") for j in work.json("job", "list", "-c", "cluster.yaml")["jobs"])


@pytest.mark.slow  # minutes
def test_a_sweep_runs_on_the_cluster_and_is_found_again(work) -> None:
    """`heliostat sweep run --cluster`: the job file is sent along, trials use the cluster's room, and the commands for jobs know
    the sweep."""
    sweep = {"name": "rates", "job": "onto.yaml", "searcher": {"name": "grid"}, "register_best": False}
    sweep["set"] = {"train.steps": 8, "evaluate.every": 8, "checkpoint.every": 8}
    sweep["space"] = {"train.optimizer.lr": {"grid": [1e-5, 1e-3]}}
    (work.folder / "rates.yaml").write_text(yaml.safe_dump(sweep))
    wrong = "space={train.optimizer.rl: {grid: [1]}}"
    refused = work.heliostat("sweep", "run", "rates.yaml", "-c", "cluster.yaml", "--set", wrong, code=2)
    assert "train.optimizer.rl: unknown key. Use one of: betas, eps, lr" in refused
    sent = work.json("sweep", "run", "rates.yaml", "-c", "cluster.yaml")
    folder = Location(sent["run_folder"])
    until(lambda: [r.status for r in trial_record.read(folder)][:1] == ["running"], "trial", LONG_S,
          said=lambda: work.heliostat("job", "logs", "rates"))  # fmt: skip
    assert work.json("job", "stop", "rates")["status"] == "STOPPED"
    assert not work.json("sweep", "show", sent["run_folder"])["running"]
    done = work.json("job", "resume", "rates", "--follow")
    assert (done["id"], done["status"]) == ("rates", "SUCCEEDED")
    found = work.json("sweep", "show", done["run_folder"])
    assert [t["status"] for t in found["trials"]] == ["finished", "finished"]
    assert found["best"]["params"] == {"train.optimizer.lr": 1e-3}
    assert work.json("job", "status", "rates")["progress"] == {
        "step": 2, "steps": 2, "fraction": 1.0, "eta_s": None, "unit": "trial"}  # fmt: skip
    assert "trial 1" in work.heliostat("job", "logs", "rates")
    assert work.json("sweep", "run", "rates.yaml", "-c", "cluster.yaml")["id"] == "rates"  # it is there already


RPC = (  # a harmless method of every service that Ray's processes offer
    "NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVKeys", "JobInfoGcsService/GetAllJobInfo",
    "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull", "CoreWorkerService/GetCoreWorkerStats",
    "RayletDriver/ClusterInfo", "RuntimeEnvService/GetOrCreateRuntimeEnv", "ReporterService/GetTraceback", "LogService/ListLogs",
)  # fmt: skip
HTTP = (
    "/api/version",
    "/api/jobs/",
    "/api/v0/nodes",
    "/nodes?view=summary",
    "/api/cluster_status",
    "/logs/",
    "/api/local_raylet_healthz",
)


def family(state: local.ClusterState) -> list[psutil.Process]:
    """Returns the nodes' processes by their parents, for any names and environments."""
    shells = [psutil.Process(n.pid) for n in state.nodes]
    return [*shells, *(p for s in shells for p in s.children(recursive=True))]


def _listening(state: local.ClusterState) -> set[tuple[str, int]]:
    found = set()
    for process in family(state):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has done its work
            for c in process.net_connections(kind="tcp"):
                if c.status == psutil.CONN_LISTEN:
                    address = c.laddr.ip.removeprefix("::ffff:")
                    found.add(("127.0.0.1" if address in ("0.0.0.0", "::") else address, c.laddr.port))
    return found


def _open_sockets(processes: list[psutil.Process] | None = None) -> set[str]:
    """Returns the inodes of listening TCP sockets, which no other socket gets: of all processes, or of some."""
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        listening |= {row[9] for row in rows if row[3] == "0A"}
    if processes is None:
        return listening
    held = set()
    for process in processes:
        with contextlib.suppress(OSError):  # a process, or a descriptor, that is gone
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    return listening & held


def _call(host: str, port: int, method: str, token: str | None) -> str:
    """Returns the status of a gRPC call with an empty request."""
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        call = channel.unary_unary(f"/ray.rpc.{method}", request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=60, metadata=[("authorization", f"Bearer {token}")] if token else None)
        except grpc.RpcError as e:
            return e.code().name
    return "OK"


def test_a_model_infers_and_is_served_on_the_cluster(work, tmp_path) -> None:
    """By its file and by its name. Both commands are drivers of that Ray, and leave it unchanged."""
    model, answers, port = write_model(tmp_path, BASE["model"], 64), tmp_path / "out", free_port()
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": f"word {i}"}) for i in range(8)))

    def drivers() -> int:
        status, jobs = dashboard.get(f"{work.state.url}/api/jobs/", work.token)
        assert status == 200
        return sum(job["type"] == "DRIVER" for job in jobs)

    before = drivers()
    words = ["--input", str(tmp_path / "in.jsonl"), "--out", str(answers), "--max-tokens", "2", "--cluster", "cluster.yaml"]
    assert work.run(tmp_path / "infer.log", "model", "infer", str(model), *words) == 0, (tmp_path / "infer.log").read_text()
    assert json.loads((answers / "inference.json").read_text())["answers"] == 8 and drivers() == before + 1
    served = work.served(model, port, log := tmp_path / "serve.log")
    try:
        asked = {"model": "tiny", "prompt": "word", "max_tokens": 3}
        got = requests.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60)
        assert got.status_code == 200 and got.json()["usage"]["completion_tokens"] <= 3
        assert drivers() > before + 1
    finally:
        served.send_signal(signal.SIGTERM)
        assert served.wait(180) == 130, log.read_text()
    assert sum(node["alive"] for node in work.json("cluster", "status", "cluster.yaml")["nodes"]) == 3


def test_an_endpoint_whose_command_was_killed_is_stopped_by_another(work, tmp_path) -> None:
    """Its proxy continues to answer, without its own paths, until `serve --stop`. A second `serve --stop` finds nothing."""
    port, log, stop = free_port(), tmp_path / "serve.log", ("model", "serve", "--cluster", "test", "--stop")
    served = work.served(write_model(tmp_path, BASE["model"], 64), port, log)
    try:
        assert work.run(log, *stop) == 2 and "its command is still running" in log.read_text()
    finally:
        served.kill()
        served.wait(60)
    assert requests.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
    assert requests.get(f"http://127.0.0.1:{port}/-/routes", timeout=60).status_code == 404
    for said in ("stopped the endpoint", "no endpoint on this cluster"):
        assert work.run(log, *stop) == 0 and log.read_text().rstrip().endswith(said), log.read_text()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/health", timeout=60)


def test_without_the_token_every_port_of_the_cluster_refuses(work) -> None:
    """Every listening port of every process: gRPC services, and the dashboard's paths. Only metrics are open."""
    state, services, paths, token = work.state, set(), set(), work.token
    ports = _listening(state)
    for host, port in ports:
        for method in RPC:
            if (said := _call(host, port, method, None)) not in ("UNIMPLEMENTED", "UNAVAILABLE"):
                services.add(method)
                assert (said, _call(host, port, method, "0" * 64)) == ("UNAUTHENTICATED",) * 2, (host, port, method)
                assert _call(host, port, method, token) != "UNAUTHENTICATED", (host, port, method)
        url = f"http://{host}:{port}"
        for path in HTTP:
            if dashboard.get(url + path, token)[0] == 200:
                paths.add(path)
                assert (dashboard.get(url + path)[0], dashboard.get(url + path, "0" * 64)[0]) == (401, 403), (host, port, path)
    assert services >= {"NodeInfoGcsService/GetAllNodeInfo", "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull"}
    assert paths >= {"/api/version", "/api/jobs/", "/api/v0/nodes"}
    assert (work.folder / ".heliostat" / "clusters" / "test" / "token").stat().st_mode & 0o077 == 0
    with pytest.raises(ClusterError, match="rejects the token"):
        _answering(Endpoint(state.url, "0" * 64, True))


def test_down_leaves_no_process_and_the_logs_stay(work) -> None:
    """This is the last test of the cluster: its logs can still be read."""
    state = work.state
    there = family(state)
    sockets = _open_sockets(there)
    assert len([p for p in there if p.is_running() and "Agent" in p.name()]) == 6 and len(sockets) > 17
    found = work.json("cluster", "down", "cluster.yaml")
    assert found["processes"] >= 20
    assert [p for p in there if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert sockets & _open_sockets() == set()  # by socket, not by port: another test's Ray may have been given a port by now
    assert not Path(state.nodes[0].folder).parent.exists()
    assert re.search(rf"step {STEPS}/{STEPS}", work.heliostat("job", "logs", "onto"))
    seen = work.json("job", "status", "onto")
    assert seen["status"] == "UNKNOWN" and seen["progress"]["fraction"] == 1.0
    assert work.json("cluster", "list")["clusters"] == []
