"""Simulates hosts, each a Ray node that can be killed, disconnected, or drained.

All hosts share `/proc` and the disks, so runs' folders are the same on all (`network.why_not` returns what this machine lacks).
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from heliostat.cluster.private_ray import SILENT, worker_environment
from heliostat.cluster.processes import end_tree

from tests.integration.network import Network
from tests.waiting import until

MARK = f"{os.getpid() % 10**6}"  # runs on the same machine must not meet
FAST = {  # a node that does not answer is dead after seconds, not a minute
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Host:
    def __init__(self, number: int, network: Network, token: Path, folder: Path) -> None:
        self.number, self.network, self.address, self.folder = number, network, network.address(number), folder
        self.process: subprocess.Popen | None = None
        self.environment = {
            **os.environ, **SILENT, **FAST, **worker_environment(0),
            "RAY_ADDRESS": f"{network.address(1)}:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
            "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        self.starts = 0

    def run(self, command: list[str], **options) -> subprocess.Popen:
        return subprocess.Popen([*self.network.inside(self.number), *command], env=self.environment, **options)

    def start(self, cpus: int) -> None:
        """Starts a Ray node; returns when it has joined the cluster."""
        self.starts += 1
        log, head = self.folder / f"node{self.number}.{self.starts}.log", f"{self.network.address(1)}:6379"
        where = ["--head", "--port=6379", "--include-dashboard=false"] if self.number == 1 else [f"--address={head}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, f"--node-ip-address={self.address}", "--block",
                   f"--num-cpus={cpus}", "--object-store-memory=150000000",
                   f"--temp-dir=/tmp/hh{MARK}/{self.number}.{self.starts}"]  # fmt: skip
        with log.open("w") as out:
            process = self.process = self.run(command, stdout=out, stderr=out)
        until(lambda: "Ray runtime started" in log.read_text(), "node", 90, lambda: process.poll() is None, log.read_text)

    def kill(self) -> None:
        if self.process:
            end_tree(self.process)
            self.process.wait()

    def cut_off(self) -> None:
        self.network.cut_off(self.number)

    def console(self) -> Console:
        return Console(self)


class Console:
    """Provides a client of Ray on the head's host, which can report a preemption to the cluster at once."""

    CODE = """
import os, sys, time, ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray tells of lost nodes on standard output, whatever it was asked
ray.init(logging_level=40, log_to_driver=False)
client = GcsClient(address=ray.get_runtime_context().gcs_address)
print("ready", file=answers, flush=True)
for line in sys.stdin:
    address, seconds = line.split()
    node = next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == address)
    until = int((time.time() + float(seconds)) * 1000)
    print(client.drain_node(node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", until), file=answers, flush=True)
"""

    def __init__(self, host: Host) -> None:
        self.process = host.run([sys.executable, "-c", self.CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def drain(self, address: str, seconds: int) -> None:
        """Drains the node, as a provider's notice of preemption does."""
        assert self.process.stdin
        print(address, seconds, file=self.process.stdin, flush=True)
        answer = self._answer()
        assert answer.startswith("(True"), answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Hosts(Network):
    """Creates hosts: `with Hosts(folder, 3) as hosts:`. hosts.all[0] is the head's. None runs Ray yet."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(f"10.{77 + os.getpid() % 100}.0", f"h{MARK}n", count)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.all = [Host(number, self, token, folder) for number in self.numbers]

    def __exit__(self, *error: object) -> None:
        for host in self.all:
            host.kill()
        super().__exit__(*error)
        shutil.rmtree(f"/tmp/hh{MARK}", ignore_errors=True)
