"""Hosts of our own on this machine: network namespaces on a bridge, each a Ray node that can be killed, cut off or drained.

`/proc` and the disks are shared, so runs' folders are the same on all. Needs root and iproute2 (`why_not` says what is missing).
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

from heliostat.chaos.process import workers
from heliostat.cluster.private_ray import SILENT, worker_environment
from heliostat.cluster.processes import end_tree

NET = f"10.{77 + os.getpid() % 100}.0"  # runs beside each other must not meet
MARK = f"{os.getpid() % 10**6}"
FAST = {  # a node that does not answer is dead after seconds, not a minute
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    try:
        ip("netns", "add", f"hp{MARK}")
        ip("netns", "del", f"hp{MARK}")
        ip("link", "add", f"bp{MARK}", "type", "bridge")
        ip("link", "del", f"bp{MARK}")
    except FileNotFoundError:
        return "needs iproute2"
    except subprocess.CalledProcessError as e:
        return f"network namespaces are not allowed here ({e.stderr.strip()})"
    return None


class Host:
    def __init__(self, number: int, token: Path, folder: Path) -> None:
        self.number, self.name, self.address, self.folder = number, f"hh{MARK}n{number}", f"{NET}.{number}", folder
        self.process: subprocess.Popen | None = None
        self.environment = {
            **os.environ, **SILENT, **FAST, **worker_environment(0),
            "RAY_ADDRESS": f"{NET}.1:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
            "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        self.starts = 0

    def plug_in(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", f"v{MARK}{self.number}", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", f"v{MARK}{self.number}", "master", f"br{MARK}", "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.name, "link", "set", "eth0", "up")
        ip("-n", self.name, "link", "set", "lo", "up")

    def run(self, command: list[str], **options) -> subprocess.Popen:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], env=self.environment, **options)

    def start(self, cpus: int) -> None:
        """A Ray node; returns when the cluster has it."""
        self.starts += 1
        log = self.folder / f"node{self.number}.{self.starts}.log"
        where = ["--head", "--port=6379", "--include-dashboard=false"] if self.number == 1 else [f"--address={NET}.1:6379"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, f"--node-ip-address={self.address}", "--block",
                   f"--num-cpus={cpus}", "--object-store-memory=150000000",
                   f"--temp-dir=/tmp/hh{MARK}/{self.number}.{self.starts}"]  # fmt: skip
        with log.open("w") as out:
            self.process = self.run(command, stdout=out, stderr=out)
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process:
            end_tree(self.process.pid)
            self.process.wait()

    def cut_off(self) -> None:
        ip("-n", self.name, "link", "set", "eth0", "down")

    def works(self) -> bool:
        return bool(self.process and workers(self.process.pid))

    def console(self) -> "Console":
        return Console(self)


class Console:
    """A client of Ray on the head's host, ready to tell the cluster of a preemption at once."""

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

    def drain(self, host: Host, seconds: int) -> None:
        """What a provider's notice of preemption becomes."""
        assert self.process.stdin
        print(host.address, seconds, file=self.process.stdin, flush=True)
        answer = self._answer()
        assert answer.startswith("(True"), answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Hosts:
    """`with Hosts(folder, 3) as hosts:` hosts.all[0] is the head's; none runs Ray yet."""

    def __init__(self, folder: Path, count: int) -> None:
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.all = [Host(number, token, folder) for number in range(1, count + 1)]

    def __enter__(self) -> "Hosts":
        ip("link", "add", f"br{MARK}", "type", "bridge")
        ip("addr", "add", f"{NET}.254/24", "dev", f"br{MARK}")
        ip("link", "set", f"br{MARK}", "up")
        for host in self.all:
            host.plug_in()
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.all:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], check=False)
        subprocess.run(["ip", "link", "del", f"br{MARK}"], check=False)
        shutil.rmtree(f"/tmp/hh{MARK}", ignore_errors=True)
