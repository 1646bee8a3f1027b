"""Real Ray nodes on this machine, from a cluster file whose addresses are all loopback, as clusters/local.yaml.

Every node is a `ray start --block` of the file's own commands, in a session of its own, with token authentication on. What was
started is written down in `.heliostat/clusters/NAME/` (`state.json`, `token`, `logs/`), so that `down` ends just these processes
and what they started. A cluster that already answers at the file's address is joined, and left running by `down`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from heliostat import workspace
from heliostat.cluster import http
from heliostat.cluster.files import ClusterFile
from heliostat.errors import ClusterError, ConfigError
from heliostat.records import Format

log = logging.getLogger(__name__)

START_S, STOP_S, KILL_S = 90.0, 4.0, 20.0  # raylets do not end by SIGTERM alone while others of the cluster end
MARK = "HELIOSTAT_NODE_DIR"  # every process of a node has it in its environment


@dataclass
class Node:
    role: str
    address: str
    folder: str
    pid: int
    created: float  # a pid is used again, a pid with its time of birth is not

    @property
    def process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
            return process if alive else None
        except psutil.NoSuchProcess:
            return None


@dataclass
class State:
    """A local cluster; `nodes` is empty if it was joined."""

    name: str
    file: str
    url: str
    nodes: list[Node] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return home() / self.name

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def token(self) -> str:
        return self.token_file.read_text().strip()

    def write(self) -> None:
        (self.folder / "state.json").write_text(json.dumps(asdict(self), indent=2))


STATE = Format(State, "record of a local cluster", ConfigError, fix="end its processes, and delete its folder")


def home() -> Path:
    return workspace.root() / ".heliostat" / "clusters"


def read(name: str) -> State | None:
    try:
        return STATE.read(home() / name / "state.json")
    except FileNotFoundError:
        return None


def known() -> list[State]:
    return [s for p in sorted(home().glob("*/state.json")) if (s := read(p.parent.name))]


def url_of(cluster: ClusterFile) -> str:
    """Where the Jobs API will be: what the head's start command says."""
    text = " ".join(cluster.raw.get("head_start_ray_commands") or [])
    host, port = re.search(r"--dashboard-host[= ](\S+)", text), re.search(r"--dashboard-port[= ](\d+)", text)
    return f"http://{host[1] if host else '127.0.0.1'}:{port[1] if port else 8265}"


def up(cluster: ClusterFile) -> State:
    """Starts the nodes that do not run; ClusterError with the end of the log if one does not come up."""
    folder = home() / cluster.name
    folder.mkdir(parents=True, exist_ok=True)
    state = read(cluster.name) or State(cluster.name, str(cluster.path), url_of(cluster))
    if state.nodes and all(n.process for n in state.nodes):
        log.info("cluster %s runs already at %s", state.name, state.url)
        return state
    if state.nodes:
        log.info("cluster %s has lost nodes; starting it anew", state.name)
        down(cluster.name)
        folder.mkdir(parents=True, exist_ok=True)
    state = State(cluster.name, str(cluster.path), url_of(cluster))
    if answer := http.probe(state.url):
        return _join(state, answer)
    _write_token(state)
    try:
        _start(cluster, state, "head", cluster.addresses[:1])
        _start(cluster, state, "worker", cluster.addresses[1:])
    except BaseException:
        down(cluster.name)
        raise
    return state


def _join(state: State, answer: int) -> State:
    """A cluster that is there already, if the caller's own token opens it."""
    token = http.own_token()
    if answer == 401 and not (token and http.probe(state.url, token) == 200):
        raise ConfigError(
            f"{state.file}: something answers at {state.url} and wants a token that we do not have; change --port and "
            "--dashboard-port in the file, or give its token in RAY_AUTH_TOKEN_PATH"
        )
    state.token_file.touch(mode=0o600)
    state.token_file.write_text(token or "")
    state.write()
    log.info("joined the cluster at %s", state.url)
    return state


def _write_token(state: State) -> None:
    state.token_file.unlink(missing_ok=True)
    state.token_file.touch(mode=0o600)
    state.token_file.write_text(secrets.token_hex(32))


def _node_folder(name: str, index: int) -> Path:
    """Short, because sockets below it must have a path under 108 characters, and the same for the same workspace."""
    key = hashlib.sha256(f"{home()}/{name}".encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"heliostat-{key}" / str(index)


def _start(cluster: ClusterFile, state: State, role: str, addresses: list[str]) -> None:
    for address in addresses:
        folder = _node_folder(state.name, len(state.nodes))
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        folder.parent.chmod(0o700)  # logs and sockets are nobody else's business
        logs = state.folder / "logs"
        logs.mkdir(exist_ok=True)
        command = "\n".join(["set -e", *cluster.raw[f"{role}_start_ray_commands"]])
        with (logs / f"{role}-{address}.log").open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", command], env=_environment(state, address, folder), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        state.nodes.append(Node(role, address, str(folder), process.pid, psutil.Process(process.pid).create_time()))
        state.write()
    _until_ready(state)


def _environment(state: State, address: str, folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    bin_folder = str(Path(sys.executable).parent)
    return {
        **kept,
        "PATH": os.pathsep.join([bin_folder, kept.get("PATH", os.defpath)]),  # of `ray`, and of the jobs' `python`
        "HELIOSTAT_NODE_IP": address,
        MARK: str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state.token_file),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _until_ready(state: State) -> None:
    """Until the dashboard counts every node that was started."""
    deadline = time.monotonic() + START_S
    while True:
        for node in state.nodes:
            if not node.process:
                raise ClusterError(f"{state.name}: the {node.role} {node.address} did not start: {_tail(state, node)}")
        if http.nodes(state.url, state.token) >= len(state.nodes):
            return
        if time.monotonic() > deadline:
            raise ClusterError(f"{state.name}: not all nodes came up in {START_S:.0f} s; look at {state.folder / 'logs'}")
        time.sleep(0.3)


def _tail(state: State, node: Node) -> str:
    text = (state.folder / "logs" / f"{node.role}-{node.address}.log").read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if "rror" in line]
    return (wrong or lines or ["it said nothing"])[-1].strip()


def down(name: str) -> int:
    """Ends the cluster's processes, all of them, and forgets it; returns how many there were."""
    state = read(name)
    if state is None:
        raise ConfigError(f"{name}: no such cluster here; `heliostat cluster list` shows those that there are")
    processes = list(_processes(state))
    for process in processes:
        _signal(process.terminate)
    _until_gone(state, STOP_S)
    for process in _processes(state):
        _signal(process.kill)
    _until_gone(state, KILL_S)
    if remaining := [p.pid for p in _processes(state)]:
        raise ClusterError(f"{name}: processes {remaining} do not end")
    for node in state.nodes:
        shutil.rmtree(Path(node.folder).parent, ignore_errors=True)
    shutil.rmtree(state.folder, ignore_errors=True)
    return len(processes)


def _until_gone(state: State, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(True for _ in _processes(state)) and time.monotonic() < deadline:
        time.sleep(0.2)


def _signal(send: Any) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()


def _processes(state: State) -> Iterator[psutil.Process]:
    """Every process of the nodes: they all have the node's folder in their environment, wherever they were forked."""
    folders = {n.folder for n in state.nodes}
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) in folders:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
