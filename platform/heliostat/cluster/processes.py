"""Starts, finds, and ends processes on this machine: process trees, and the processes of Ray nodes.

The processes of a node have the node's folder in their environment (`MARK`). Ray's agents, dashboard modules, and workers
overwrite their environment with a title. heliostat recognizes these processes by their open log files in the node's folder.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import signal
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from heliostat.errors import ClusterError

MARK = "HELIOSTAT_NODE_DIR"
STOP_S, KILL_S = 4.0, 20.0  # SIGTERM alone doesn't end a raylet while other nodes of the cluster are ending
LOOK_S = 0.1  # between two checks of which processes have ended
PORTS = range(20_000, 32_768)  # above the ports of Ray's workers, and below the ephemeral ports of connections
PORT_TRIES = 100


def alive(pid: int, created: float) -> psutil.Process | None:
    """Returns the process with this id and start time; None if the process has ended. The id alone isn't enough, because a later
    process could have the same id.

    `created`: seconds since the epoch.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def descendants(root: int) -> list[psutil.Process]:
    """Lists the descendants of a process; empty if the process has ended."""
    try:
        return psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def family(root: int) -> list[psutil.Process]:
    """Lists a process and its descendants; empty if the process has ended."""
    try:
        return [psutil.Process(root), *descendants(root)]
    except psutil.NoSuchProcess:
        return []


def stop(processes: Iterable[psutil.Process], patience_s: float = 0.0, kill_s: float = KILL_S) -> None:
    """Ends processes: sends SIGTERM, waits `patience_s`, then sends SIGKILL to the remaining processes and waits at most
    `kill_s`.

    If `patience_s` is 0, sends only SIGKILL. While this function waits, it reaps children of this process. So the `Popen` objects
    of these children get no exit code.
    """
    left = list(processes)
    for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, kill_s)):
        if number == signal.SIGTERM and not wait_s:
            continue
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        deadline = time.monotonic() + wait_s
        while left and time.monotonic() < deadline:
            _, left = psutil.wait_procs(left, timeout=LOOK_S)
            left = [process for process in left if _runs(process)]  # in a container, a zombie may never disappear


class OwnProcess(Protocol):
    """Describes a child of this process, such as `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...


def end_tree(root: OwnProcess, patience_s: float = 0.0, kill_s: float = KILL_S) -> None:
    """Ends a process and its descendants with `stop`. If `patience_s` is 0, the processes end as if the power failed.

    Does nothing if the process has ended, because the ended process's id may now belong to another process.
    """
    if root.poll() is None:
        stop(family(root.pid), patience_s, kill_s)


def detached(command: Sequence[str], log: Path, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Starts a command in its own session, without input, with output appended to a log file. Returns the process id."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    return process.pid


def free_port(host: str = "") -> int:
    """Finds a free TCP port of an address, or of all addresses of this machine. Raises ClusterError after 100 attempts.

    The port isn't an ephemeral port. Ray opens hundreds of connections while it starts, and one of these connections could take
    an ephemeral port before the server opens it.
    """
    for _ in range(PORT_TRIES):
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ClusterError(
        f"no free TCP port in {PORTS.start} to {PORTS.stop - 1} in {PORT_TRIES} attempts. End the processes that use them"
    )


def listening_fault(url: str) -> str:
    """Explains why a server can't listen at a URL's address; returns "" if a server can listen there.

    The port may be in use by a connection of another process.
    """
    parts = urllib.parse.urlsplit(url)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like servers: an ended connection doesn't block the port
        try:
            probe.bind((parts.hostname, parts.port))
        except socket.gaierror:
            return f"--dashboard-host: unknown host ({parts.hostname}). Use 127.0.0.1, or an address of this machine"
        except OSError as e:
            if e.errno == errno.EADDRNOTAVAIL:
                return f"--dashboard-host: isn't an address of this machine ({parts.hostname}). Use 127.0.0.1"
            return f"--dashboard-port: the port is in use ({parts.port}). Stop the process that uses it, or give another port"
    return ""


# the processes of Ray nodes ----------------------------------------------------------------------------------------------


@dataclass
class Node:
    """Describes a Ray node that heliostat started. `pid` and `created` (seconds since the epoch) identify the node's shell."""

    role: str
    address: str
    folder: str
    pid: int
    created: float

    @property
    def process(self) -> psutil.Process | None:
        """Returns the shell that runs the node's start command; None if this shell has ended."""
        return alive(self.pid, self.created)


def of(nodes: list[Node]) -> Iterator[psutil.Process]:
    """Yields every process that belongs to one of the nodes, no matter which process forked it."""
    folders = {n.folder for n in nodes}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.status() != psutil.STATUS_ZOMBIE and _folder(process, folders) is not None:
                yield process


def _folder(process: psutil.Process, folders: set[str]) -> str | None:
    if (mark := process.environ().get(MARK)) is not None:
        return mark if mark in folders else None
    if not process.name().startswith("ray"):
        return None
    paths = [Path(f.path) for f in process.open_files()]
    return next((f for f in folders if any(Path(f) in path.parents for path in paths)), None)


def living(nodes: list[Node]) -> list[Node]:
    """Returns the nodes that run. A raylet can keep running after its shell was killed."""
    raylets = set[str | None]()
    for process in of(nodes):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # the process ends meanwhile
            if process.name() == "raylet":
                raylets.add(process.environ().get(MARK))
    return [n for n in nodes if n.process or n.folder in raylets]


def end(nodes: list[Node]) -> tuple[int, list[int]]:
    """Ends all processes of the nodes. Returns the number of these processes, and the ids of the processes that still run."""
    known = {p.pid: p for p in of(nodes)}
    known.update({p.pid: p for process in [*known.values()] for p in descendants(process.pid)})  # they may lack the mark
    for number, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, KILL_S)):
        for process in _left(known, nodes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        deadline = time.monotonic() + patience
        while _left(known, nodes) and time.monotonic() < deadline:
            time.sleep(0.2)
    return len(known), [p.pid for p in _left(known, nodes)]


def _left(known: dict[int, psutil.Process], nodes: list[Node]) -> list[psutil.Process]:
    """Lists the processes in `known` that still run. First adds new processes of the nodes to `known`."""
    known.update({p.pid: p for p in of(nodes) if p.pid not in known})
    return [p for p in known.values() if _runs(p)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
