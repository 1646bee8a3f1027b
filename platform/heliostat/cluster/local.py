"""Starts and stops Ray nodes on this machine, from a cluster file with only loopback addresses, such as clusters/local.yaml.

Every node runs the file's own `ray start --block` commands in its own session, with token authentication on. The record of the
nodes is in `.heliostat/clusters/NAME/` (`state.json`, `token`, `logs/`). With this record, `down` ends only these processes and
their descendants.

`up` doesn't change running nodes: it only restarts nodes that died. If a cluster already answers at the file's address, `up`
joins this cluster, and `down` doesn't end it. If the file has `idle_timeout_minutes`, a process (the module `idle`) ends the
cluster after this number of minutes without a job.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from heliostat.cluster import dashboard, private, processes
from heliostat.cluster.cluster_file import ClusterFile
from heliostat.cluster.private_ray import PATIENT, URGENT
from heliostat.cluster.processes import MARK, Node
from heliostat.config import workspace
from heliostat.errors import ClusterError, ConfigError
from heliostat.storage.records import Format

log = logging.getLogger(__name__)

START_S = 90.0
LATE = "timed out during startup"  # is in the log of a node if Ray gave up its start


@dataclass
class ClusterState:
    """Describes a local cluster. `nodes` is empty if heliostat joined the cluster instead of starting the cluster."""

    name: str
    file: str
    url: str
    nodes: list[Node] = field(default_factory=list)
    watcher: tuple[int, float] | None = None  # (id, start time) of the process that ends an idle cluster

    @property
    def folder(self) -> Path:
        return home() / workspace.check_name("the cluster's name", self.name)

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def token(self) -> str:
        """Reads the cluster's token; raises ConfigError if the token's file isn't readable."""
        try:
            return self.token_file.read_text().strip()
        except OSError as e:
            raise ConfigError(
                f"{self.token_file}: can't read the token ({e.strerror}). Run: heliostat cluster down {self.name}"
            ) from e

    def write(self) -> None:
        (self.folder / "state.json").write_text(json.dumps(asdict(self), indent=2))


STATE = Format(
    ClusterState, "record of a local cluster", ConfigError, fix="End the cluster's processes, and delete the cluster's folder"
)


def home() -> Path:
    """Returns the folder with the records of the workspace's local clusters."""
    return workspace.root() / ".heliostat" / "clusters"


def read(name: str) -> ClusterState | None:
    """Reads the record of a local cluster; None if there is no such cluster. Raises ConfigError if the record names another
    cluster's folders."""
    place = home() / workspace.check_name("the cluster's name", name) / "state.json"
    try:
        state = STATE.read(place)
    except FileNotFoundError:
        return None
    if any(Path(n.folder).parent.name != _node_folder(name, 0).parent.name for n in state.nodes):  # `down` removes them
        raise ConfigError(
            f"{place}: names folders of another cluster, perhaps because the record was copied here. Remove this record"
        )
    return replace(state, name=name)


def known() -> list[ClusterState]:
    """Lists the local clusters of this workspace, running or not."""
    return [s for p in sorted(home().glob("*/state.json")) if (s := read(p.parent.name))]


def url_of(cluster: ClusterFile) -> str:
    """Returns the URL of the Jobs API, from the head's start command."""
    text = " ".join(cluster.raw.get("head_start_ray_commands") or [])
    host, port = re.search(r"--dashboard-host[= ](\S+)", text), re.search(r"--dashboard-port[= ](\d+)", text)
    return f"http://{host[1] if host else '127.0.0.1'}:{port[1] if port else 8265}"


def up(cluster: ClusterFile, restart: bool = False) -> ClusterState:
    """Starts the nodes that don't run, or joins a cluster that already answers at the file's address.

    `restart`: whether to end the running nodes first. If a node doesn't start, raises ClusterError with an error line of the
    node's log.
    """
    state = read(cluster.name)
    if state and restart:
        if not state.nodes:
            raise ConfigError(
                f"--restart: heliostat joined the cluster at {state.url} and didn't start it. Restart this "
                "cluster where it was started"
            )
        down(cluster.name)
        state = None
    if state and state.nodes:
        alive = processes.living(state.nodes)
        if state.nodes[0] in alive:
            return _watched(cluster, _complete(cluster, state, alive))
        if alive:
            raise ClusterError(
                f"{cluster.name}: its head has died, and {len(alive)} of its workers still run. To end and "
                "restart them: heliostat cluster up --restart"
            )
        log.info("cluster %s has no running processes. Starting the cluster again", state.name)
        down(cluster.name)
    state = ClusterState(cluster.name, str(cluster.path), url_of(cluster))
    state.folder.mkdir(parents=True, exist_ok=True)
    if answer := dashboard.probe(state.url):
        return _join(state, answer)
    if fault := processes.listening_fault(state.url):
        raise ConfigError(f"{state.file}: {fault}")
    private.write_token(state.token_file)
    try:
        _start(cluster, state, "head", cluster.addresses[:1])
        _start_workers(cluster, state)
    except BaseException:
        down(cluster.name)
        raise
    return _watched(cluster, state)


def _start_workers(cluster: ClusterFile, state: ClusterState) -> None:
    """Starts all workers. On a busy machine, Ray may give up after 30 s to start a worker. If so, tries once more to start this
    worker."""
    try:
        _start(cluster, state, "worker", cluster.addresses[1:])
    except ClusterError as e:
        alive = processes.living(state.nodes)
        ended = [n for n in state.nodes if n not in alive]
        if not ended or not all(LATE in _log(state, n) for n in ended):
            raise
        log.warning("%s. Starting the worker once more", e)
        _complete(cluster, state, alive)
        _until_ready(state, cluster.addresses[1:], set())


def _watched(cluster: ClusterFile, state: ClusterState) -> ClusterState:
    """Makes sure that exactly one process will end the cluster after the file's `idle_timeout_minutes` without a job.

    If such a process already runs with a different number of minutes, ends that process first.
    """
    minutes = cluster.raw.get("idle_timeout_minutes")
    wanted = ["-m", "heliostat.cluster.idle", state.name, str(minutes)]
    if watcher := _watcher(state):
        if minutes and _command(watcher)[-len(wanted) :] == wanted:
            return state
        processes.stop([watcher])
        state.watcher = None
        state.write()
        log.info("cluster %s: stopped the idle watcher, because idle_timeout_minutes has changed", state.name)
    if not minutes:
        return state
    pid = processes.detached([sys.executable, *wanted], state.folder / "logs" / "idle.log", workspace.root())
    state.watcher = pid, psutil.Process(pid).create_time()
    state.write()
    log.info("cluster %s ends after %g minutes without a job (idle_timeout_minutes)", state.name, minutes)
    return state


def _watcher(state: ClusterState) -> psutil.Process | None:
    """Returns the process that will end the idle cluster; None if that process has ended, or is the current process."""
    if state.watcher is None or state.watcher[0] == os.getpid():
        return None
    return processes.alive(*state.watcher)


def _command(process: psutil.Process) -> list[str]:
    """Reads a process's command line; empty if the process has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _complete(cluster: ClusterFile, state: ClusterState, alive: list[Node]) -> ClusterState:
    """Starts the file's workers that don't run. Running nodes and their work stay unchanged."""
    dead = [n for n in state.nodes if n not in alive]
    processes.end(dead)
    state.nodes = [n for n in state.nodes if n in alive]
    addresses = {n.address for n in state.nodes}
    if more := [n.address for n in state.nodes if n.address not in cluster.addresses]:
        log.warning(
            "%s: nodes %s run, but aren't in %s. `--restart` starts only the nodes in the file", state.name, more, cluster.path
        )
    missing = [a for a in cluster.addresses[1:] if a not in addresses]
    log.info("cluster %s already runs at %s%s", state.name, state.url, f"; starting {', '.join(missing)}" if missing else "")
    _start(cluster, state, "worker", missing)
    return state


def _join(state: ClusterState, answer: int) -> ClusterState:
    """Joins a cluster that already answers.

    Raises ConfigError if another user owns the cluster's processes, or if the cluster rejects this user's token.
    """
    elsewhere = "Change --port and --dashboard-port in the file"
    if answer not in (200, 401, 403):
        raise ConfigError(f"{state.file}: something other than a Ray cluster answers at {state.url} ({answer}). {elsewhere}")
    if not private.ours(state.url):
        raise ConfigError(
            f"{state.file}: another user's process answers at {state.url}, so heliostat sent no token. "
            f"{elsewhere}. Or if you trust that user with your token and your code, run: heliostat submit --cluster "
            f"{state.url}"
        )
    token = dashboard.own_token()
    if answer != 200 and not (token and dashboard.probe(state.url, token) == 200):
        raise ConfigError(
            f"{state.file}: the server at {state.url} needs a token that heliostat doesn't have. {elsewhere}, or "
            "set RAY_AUTH_TOKEN_PATH to the file with the server's token"
        )
    private.write_token(state.token_file, token or "")
    state.write()
    log.info("joined the cluster at %s", state.url)
    return state


def _node_folder(name: str, index: int) -> Path:
    """Returns a node's folder. The folder of a workspace's node has the same path each time.

    The folder's path is short, because the path of a socket in the folder must have fewer than 108 characters.
    """
    key = hashlib.sha256(f"{home()}/{name}".encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"heliostat-{key}" / str(index)


def _start(cluster: ClusterFile, state: ClusterState, role: str, addresses: list[str]) -> None:
    before = {n["id"] for n in dashboard.node_table(state.url, state.token)} if state.nodes and addresses else set()
    taken = {n.folder for n in state.nodes}
    free = (f for i in range(1000) if str(f := _node_folder(state.name, i)) not in taken)
    for address, folder in zip(addresses, free, strict=False):
        private.folder(folder.parent)  # only this user may read logs and use sockets
        shutil.rmtree(folder, ignore_errors=True)  # left by a node that died
        folder.mkdir(mode=0o700)
        logs = state.folder / "logs"
        logs.mkdir(exist_ok=True)
        command = "\n".join(["set -e", *cluster.raw[f"{role}_start_ray_commands"]])
        log_file = logs / f"{role}-{address}.log"
        log_file.unlink(missing_ok=True)  # left by a node that died
        pid = processes.detached(["bash", "-c", command], log_file, environment=_environment(state, address, folder))
        state.nodes.append(Node(role, address, str(folder), pid, psutil.Process(pid).create_time()))
        state.write()
    _until_ready(state, addresses, before)


def _environment(state: ClusterState, address: str, folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    return {
        **PATIENT,
        **URGENT,
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)]),  # contains `ray` and `python`
        "HELIOSTAT_NODE_IP": address,
        MARK: str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state.token_file),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _until_ready(state: ClusterState, addresses: list[str], before: set[str]) -> None:
    """Waits until the dashboard lists a new living node at every address. `before`: the ids of earlier nodes.

    Raises ClusterError if a node's process ends, or if not all nodes are ready within 90 s.
    """
    deadline = time.monotonic() + START_S
    while addresses:
        for node in state.nodes:
            if node.address in addresses and not node.process:
                raise ClusterError(f"{state.name}: the {node.role} {node.address} didn't start: {_tail(state, node)}")
        if private.ours(state.url):  # a process that took the port meanwhile must not get the token
            table = dashboard.node_table(state.url, state.token)
            if {n["address"] for n in table if n["alive"] and n["id"] not in before} >= set(addresses):
                return
        if time.monotonic() > deadline:
            raise ClusterError(f"{state.name}: after {START_S:.0f} s {_missing(state, addresses, before)}")
        time.sleep(0.3)


def _missing(state: ClusterState, addresses: list[str], before: set[str]) -> str:
    """Explains which nodes haven't joined yet, with a line of each node's log: the last line with an error, or else the last
    line."""
    if not private.ours(state.url):
        return (
            f"no dashboard of this user answers at {state.url}. If another process uses the port, change "
            "--dashboard-port in the file"
        )
    ready = {n["address"] for n in dashboard.node_table(state.url, state.token) if n["alive"] and n["id"] not in before}
    late = [n for n in state.nodes if n.address in addresses and n.address not in ready]
    return (
        "; ".join(f"the {n.role} {n.address} hasn't joined: {_tail(state, n)}" for n in late)
        or "nodes joined too late. Run the command again"
    )


def _log(state: ClusterState, node: Node) -> str:
    return (state.folder / "logs" / f"{node.role}-{node.address}.log").read_text(errors="replace")


def _tail(state: ClusterState, node: Node) -> str:
    lines = [line for line in _log(state, node).splitlines() if line.strip()]
    wrong = [line for line in lines if "rror" in line]
    return (wrong or lines or ["the node printed no output"])[-1].strip()


def down(name: str) -> int:
    """Ends all of the cluster's processes, deletes its record, and returns the number of ended processes.

    Raises ConfigError if there is no such cluster. Raises ClusterError if processes don't end.
    """
    state = read(name)
    if state is None:
        raise ConfigError(f"{name}: no such cluster on this machine. List the clusters: heliostat cluster list")
    if watcher := _watcher(state):
        processes.stop([watcher])
    ended, remaining = processes.end(state.nodes)
    if remaining:
        raise ClusterError(f"{name}: processes {remaining} don't end. End these processes with `kill -9`")
    for node in state.nodes:
        shutil.rmtree(Path(node.folder).parent, ignore_errors=True)
    shutil.rmtree(state.folder, ignore_errors=True)
    return ended
