"""Starts a Ray cluster of several nodes on this machine. Each node is a raylet on its own loopback address, and can be killed
without the other nodes.

The head (127.0.0.1) has no CPUs, and runs the driver and Ray's own services. A process that connects to the cluster needs the
environment variables in `environment`.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from heliostat.chaos.process import ChaosError, workers
from heliostat.cluster import private, processes
from heliostat.cluster.private_ray import PATIENT, SILENT, URGENT
from heliostat.cluster.processes import free_port
from heliostat.config import workspace

logger = logging.getLogger(__name__)

START_S = 90.0  # seconds for one attempt to start a node
STARTS = 3  # attempts to start a node, because another process may briefly use a port that was free before
SESSIONS = Path(tempfile.gettempdir()) / f"hx{os.getpid()}"  # short, because a socket's path has at most 107 characters


class ChaosNode:
    def __init__(self, address: str, process: subprocess.Popen[bytes]) -> None:
        self.address, self.process = address, process

    def workers(self) -> list[psutil.Process]:
        return workers(self.process.pid)

    def kill(self) -> None:
        """Kills all processes of the node immediately."""
        processes.end_tree(self.process)
        self.process.wait()


class LocalNodes:
    """Runs a cluster of local nodes while its context lasts: `with LocalNodes(folder, count, cpus) as nodes:`."""

    inside: tuple[str, ...] = ()
    """Prefix of the command line that starts the next nodes, for example a command that hides files from these nodes."""

    def __init__(self, folder: Path, count: int, cpus: float) -> None:
        self._folder, self._count, self._cpus = folder, count, cpus
        self.address, self._client_port = f"127.0.0.1:{free_port()}", free_port()
        token = folder / "ray-token"
        private.write_token(token)
        self.environment = {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.nodes: list[ChaosNode] = []

    def __enter__(self) -> LocalNodes:
        self.start()
        return self

    def start(self) -> None:
        """Starts all nodes. After `stop`, starts them again at the same addresses."""
        try:
            self._start("127.0.0.1", "--head", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0",
                        f"--ray-client-server-port={self._client_port}", "--include-dashboard=false")  # fmt: skip
            self._numbers = itertools.count(2)
            for _ in range(self._count):
                self.add()
        except BaseException:
            self.stop()
            raise

    def add(self, gpus: int = 0) -> ChaosNode:
        """Starts another node, at a new address, and waits until it has joined the cluster. `gpus`: the number of GPUs that Ray
        counts on the node, which the machine doesn't need to have."""
        resources = (f"--num-cpus={self._cpus:g}", f"--num-gpus={gpus}")
        self._start(f"127.0.0.{next(self._numbers)}", f"--address={self.address}", *resources)
        return self.nodes[-1]

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kills the whole cluster, the head first."""
        for node in self.nodes:
            node.kill()
        self.nodes = []
        shutil.rmtree(SESSIONS, ignore_errors=True)

    def _start(self, host: str, *arguments: str) -> None:
        """Starts a node, and waits until it has joined the cluster. Raises ChaosError after STARTS failed attempts."""
        private.folder(SESSIONS)
        log = self._folder / f"node-{host}.log"
        environment = {**SILENT, **PATIENT, **URGENT, **os.environ, **self.environment}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(workspace.root()), environment.get("PYTHONPATH")]))
        files = SESSIONS / host.rpartition(".")[2]
        command = [*self.inside, sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={host}",
                   *arguments, "--block", f"--temp-dir={files}", "--object-store-memory=200000000"]  # fmt: skip
        for _ in range(STARTS):
            with log.open("w") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=workspace.root())
            self.nodes.append(ChaosNode(host, process))
            if _joined(process, log):
                return
            self.nodes.pop().kill()
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            logger.warning("the Ray node at %s didn't start: %s", host, last[:200])
        raise ChaosError(f"the Ray node at {host} didn't start in {STARTS} attempts ({last[:200]}). Read {log}")


def _joined(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits until a node has joined its cluster. Returns False if the node ends first, or takes too long."""
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
