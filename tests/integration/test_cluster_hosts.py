"""Tests real clusters over several hosts: `ray up` over ssh from clusters/ssh.yaml, and autoscaling from a cluster file.

Both take a minute or two and change the machine's network: `make test-slow`, as root.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from heliostat.chaos.servers import ServerProcess
from heliostat.cluster import dashboard as http
from heliostat.cluster.processes import free_port

from tests.integration import ssh_hosts as hosts
from tests.integration.conftest import tiny_job
from tests.waiting import until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WHY = hosts.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY)]
QUICK = {"RAY_UP_enable_autoscaler_v2": "0", "OMP_NUM_THREADS": "1"}


def heliostat(folder: Path, env: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "heliostat", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, f"{arguments}: exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def living(url: str, token: str) -> int:
    return sum(n["alive"] for n in http.node_table(url, token))


@pytest.fixture
def server(tracking: str, tmp_path: Path) -> Iterator[str]:
    """Runs MLflow over HTTP, at an address that the hosts reach."""
    command = [str(BIN / "mlflow"), "server", "--backend-store-uri", tracking, "--workers", "1", "--allowed-hosts", "*"]
    command += ["--host", "0.0.0.0", "--port", "PORT", "--artifacts-destination", str(tmp_path / "artifacts")]
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with ServerProcess(command, "/health", tmp_path / "mlflow.log", off) as running:
        yield str(running.port)


def test_ray_up_over_ssh_trains_across_hosts_and_nodes_come_and_go(tmp_path, corpus, server) -> None:
    """clusters/ssh.yaml with test addresses: up, a job of two workers on two hosts, another node, a lost node, and down."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, **QUICK, "PYTHONPATH": str(ROOT / "platform"), "HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / ".ray" / "auth_token")}
    with hosts.Hosts(tmp_path, 4) as there:
        head, *workers = there.addresses
        raw = yaml.safe_load((ROOT / "clusters" / "ssh.yaml").read_text().replace("/opt/heliostat/bin", str(BIN)))
        raw["cluster_name"] = f"hosts{os.getpid()}"
        raw["auth"] = {"ssh_user": "root", "ssh_private_key": str(there.key)}
        raw["max_workers"] = 2
        raw["provider"] |= {"head_ip": head, "worker_ips": workers[:2]}
        small = "ray start --num-cpus=3 --object-store-memory=200000000"
        raw["worker_start_ray_commands"] = [c.replace("ray start", small) for c in raw["worker_start_ray_commands"]]
        file = tmp_path / "hosts.yaml"
        file.write_text(yaml.safe_dump(raw))
        try:
            heliostat(tmp_path, env, "cluster", "up", "hosts.yaml")

            def alive(count: int) -> Callable[[], bool]:
                def there_are() -> bool:
                    out = json.loads(heliostat(tmp_path, env, "cluster", "status", "hosts.yaml", "--json").splitlines()[-1])
                    return sum(n["alive"] for n in out["nodes"]) == count

                return there_are

            until(alive(3), "third node", 180)
            job = {**tiny_job(corpus, "", tmp_path), "name": "hosts", "workers": {"count": 2, "cpus": 2}}
            job["train"] |= {"steps": 6}
            job |= {"checkpoint": {"every": 6}, "evaluate": {"every": 6, "samples": 8, "fraction": 0.05}}
            job["mlflow"] = {"uri": f"http://{hosts.MASTER}:{server}", "experiment": "hosts"}
            (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
            log = heliostat(tmp_path, env, "submit", "job.yaml", "-c", "hosts.yaml", "--follow")
            assert "step 6/6" in log
            saved = json.loads((tmp_path / "runs" / "hosts" / "result.json").read_text())
            assert saved["steps"] == 6

            raw["provider"]["worker_ips"], raw["max_workers"] = workers, 3
            file.write_text(yaml.safe_dump(raw))
            heliostat(tmp_path, env, "cluster", "up", "hosts.yaml", "--restart")  # the autoscaler has read its hosts at its start
            until(alive(4), "fourth node", 180)
            there.lose(workers[0])
            until(alive(3), "news of the lost node", 180)
        finally:
            heliostat(tmp_path, env, "cluster", "down", "hosts.yaml")
        assert [there.run(a, "pgrep -c raylet || true").strip() for a in there.addresses if a != workers[0]] == ["0"] * 3


AUTOSCALE = """
cluster_name: scaled
max_workers: 2
idle_timeout_minutes: 0.1
upscaling_speed: 1.0
auth: {}
docker: {}
file_mounts: {}
cluster_synced_files: []
initialization_commands: []
setup_commands: []
head_setup_commands: []
worker_setup_commands: []
head_start_ray_commands: []
worker_start_ray_commands: []
head_node_type: ray.head.default
provider:
  type: external
  module: tests.integration.nodes_apart.NodesApart
  head_node_id: fffffffffffffffffffffffffffffffffffffffffffffffffff00000
  launch_multiple: true
  gcs_address: 127.0.0.9:PORT
available_node_types:
  ray.head.default: {resources: {CPU: 0}, node_config: {}, max_workers: 0}
  train: {resources: {CPU: 3}, labels: {heliostat-pool: train}, node_config: {}, min_workers: 0, max_workers: 2}
"""


def test_a_job_that_needs_more_nodes_gets_them_and_they_go_when_idle(tmp_path, corpus, tracking) -> None:
    """From a cluster file, with Ray's own autoscaler. Only its nodes are processes of this machine."""
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    port, dashboard = free_port(), free_port()
    (tmp_path / "scaled.yaml").write_text(AUTOSCALE.replace("PORT", str(port)))
    (tmp_path / "token").write_text("fedcba9876543210" * 4)
    env = {**os.environ, **QUICK, "PYTHONPATH": str(ROOT / "platform"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    env |= {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "HELIOSTAT_NODE_DIR": str(tmp_path),
    }
    heliostat(tmp_path, env, "cluster", "check", "scaled.yaml")
    temp = Path("/tmp") / f"hel-{os.getpid()}"
    command = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=0"]
    command += ["--node-ip-address=127.0.0.9", f"--temp-dir={temp}", "--object-store-memory=200000000"]
    # the session's own Ray has an agent on the default port
    command += [f"--autoscaling-config={tmp_path / 'scaled.yaml'}", f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--ray-client-server-port={free_port()}"]
    temp.mkdir()
    scaling = {"PYTHONPATH": f"{env['PYTHONPATH']}:{ROOT}", "HELIOSTAT_NODES": str(temp)}
    scaling |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": "f" * 51 + "00000", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env={**env, **scaling}, stdout=log, stderr=log, start_new_session=True)
    url, token = f"http://127.0.0.1:{dashboard}", (tmp_path / "token").read_text()
    try:
        until(lambda: living(url, token) == 1, "head", 180)
        job = {**tiny_job(corpus, tracking, tmp_path), "name": "scaled"}
        job["workers"] = {"count": 2, "cpus": 2, "labels": {"heliostat-pool": "train"}}  # one on each of two nodes
        job["train"] |= {"steps": 6}
        job |= {"checkpoint": {"every": 6}, "evaluate": {"every": 6, "samples": 8, "fraction": 0.05}}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        heliostat(tmp_path, env, "submit", "job.yaml", "-c", url)
        until(lambda: living(url, token) == 3, "two nodes more")
        log_ = heliostat(tmp_path, env, "job", "logs", "scaled", "--follow")
        assert "step 6/6" in log_
        until(lambda: living(url, token) == 1, "end of what is idle")
    finally:
        mine = [p for p in psutil.process_iter() if _is_of(p, tmp_path)]
        # Ray's agents have put their titles over their environment
        for one in {*mine, *(child for p in mine for child in p.children(recursive=True))}:
            one.kill()
        head.wait(20)
        shutil.rmtree(temp, ignore_errors=True)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get("HELIOSTAT_NODE_DIR") == str(folder)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
