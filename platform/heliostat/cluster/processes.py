"""Finds and ends the processes of Ray nodes on this machine.

A node's processes have its folder in their environment (`MARK`). Those that Ray gives a title (its agents, dashboard modules and
workers) overwrite their environment with it; they are recognized by the logs below the folder that they hold open.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "HELIOSTAT_NODE_DIR"
STOP_S, KILL_S = 4.0, 20.0  # raylets do not end by SIGTERM alone while others of the cluster end


@dataclass
class Node:
    role: str
    address: str
    folder: str
    pid: int
    created: float  # a pid is used again, a pid with its time of birth is not

    @property
    def process(self) -> psutil.Process | None:
        """Returns the shell that was started for the node; None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
            return process if alive else None
        except psutil.NoSuchProcess:
            return None


def of(nodes: list[Node]) -> Iterator[psutil.Process]:
    """Yields every process of the nodes, wherever it was forked."""
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
    held = [Path(f.path) for f in process.open_files()]
    return next((f for f in folders if any(Path(f) in path.parents for path in held)), None)


def living(nodes: list[Node]) -> list[Node]:
    """Selects the nodes that run: a node's shell may have been killed while its raylet runs on."""
    raylets = set[str | None]()
    for process in of(nodes):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ends meanwhile
            if process.name() == "raylet":
                raylets.add(process.environ().get(MARK))
    return [n for n in nodes if n.process or n.folder in raylets]


def end(nodes: list[Node]) -> tuple[int, list[int]]:
    """Ends all processes of the nodes; returns how many there were, and the pids of those that remain."""
    there = {p.pid: p for p in of(nodes)}
    for process in list(there.values()):  # what they started without the mark
        with contextlib.suppress(psutil.NoSuchProcess):
            there.update({p.pid: p for p in process.children(recursive=True)})
    for number, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, KILL_S)):
        for process in _left(there, nodes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        deadline = time.monotonic() + patience
        while _left(there, nodes) and time.monotonic() < deadline:
            time.sleep(0.2)
    return len(there), [p.pid for p in _left(there, nodes)]


def _left(there: dict[int, psutil.Process], nodes: list[Node]) -> list[psutil.Process]:
    """Lists the processes that still run, of those in `there` and of the nodes' new ones, which it adds to `there`."""
    there.update({p.pid: p for p in of(nodes) if p.pid not in there})
    return [p for p in there.values() if _runs(p)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
