"""Runs a command of recorded tasks despite faults, and counts the tasks that run again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs
from heliostat.chaos.nodes import LocalNodes
from heliostat.cluster.processes import descendants, end_tree
from heliostat.storage.locations import Location

STARTS = 12  # of a round, at most
LIMIT_S = 150.0  # of a start
END_S = 20.0  # for Ray's processes to see that their driver has ended
BEHIND_S = 0.5  # a task's end, at most, that a fault strikes
NO_TASK = ("IDLE", "RuntimeEnvAgent", "DashboardAgent")  # in the names of Ray's processes that run none


class Round:
    """Runs one command, `heliostat WORDS --json`, repeatedly until it has a result.

    `done`: the place of its records; `rng` draws the times of faults among `tasks`, the number of an unbroken run's tasks;
    `removed`: the kinds of tasks whose records, and their files, an orderly failing command removes.
    """

    def __init__(self, folder: Path, words: Iterable[str], done: Location, rng: random.Random, tasks: int = 0,
                 environment: dict[str, str] | None = None, removed: tuple[str, ...] = (),
                 limit_s: float = LIMIT_S) -> None:  # fmt: skip
        self.folder, self.words, self.done, self.rng, self.tasks = folder, list(words), done, rng, tasks
        self.environment, self.removed, self.limit_s = environment or {}, removed, limit_s
        self.recorded: dict[str, object] = {}
        self.starts = self.struck = self.finished = self.again = 0
        self.result: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        return self.result is not None or self.starts == STARTS

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        command = [sys.executable, "-m", "heliostat", *self.words, "--json"]
        with (self.folder / "said").open("wb") as said, (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=said, stderr=log, env={**os.environ, **self.environment})

    def until(self, run: subprocess.Popen[bytes], target: int | None = None) -> bool:
        """Waits until so many tasks are recorded, a random number unless it is given; returns whether the run is still alive
        then, and counts the finished tasks."""
        if target is None:
            target = self.rng.randrange(self.count(), max(self.tasks, self.count()) + 1)
        end = time.monotonic() + self.limit_s
        while run.poll() is None and self.count() < target and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(self.rng.uniform(0, BEHIND_S))
        self.look()
        return run.poll() is None

    def end(self, run: subprocess.Popen[bytes], in_order: bool) -> None:
        """Takes the result of a start; kills a start that doesn't end."""
        try:
            run.wait(self.limit_s)
        except subprocess.TimeoutExpired:
            print(f"{self.folder}: did not end within {self.limit_s:.0f} s", flush=True)
            end_tree(run)
        with contextlib.suppress(ValueError, IndexError):
            said = json.loads((self.folder / "said").read_bytes().splitlines()[-1])
            self.result = None if "error" in said else said
        removed = in_order and self.result is None
        if removed:
            self._forget_removed()
        self.look()
        if removed:
            self._forget_removed()

    def _forget_removed(self) -> None:
        self.recorded = {name: at for name, at in self.recorded.items() if name.split("/")[0] not in self.removed}

    def look(self) -> None:
        """Counts the tasks that are newly recorded, and those whose records have changed."""
        found = self._records()
        self.finished += len(found.keys() - self.recorded.keys())
        self.again += sum(name in found and found[name] != at for name, at in self.recorded.items())
        self.recorded.update(found)

    def _records(self) -> dict[str, object]:
        """Maps every recorded task to its record's time and content, which includes the seconds and the run."""
        selector = pafs.FileSelector(self.done.path, recursive=True, allow_not_found=True)
        infos = self.done.attempt(lambda: self.done.fs.get_file_info(selector))
        files = {i.path[len(self.done.path) + 1 :]: i.mtime_ns for i in infos if i.path.endswith(".json")}
        return {name: (at, self.done.join(name).read()) for name, at in files.items()}

    def count(self) -> int:
        return sum(1 for _ in Path(self.done.path).rglob("*.json"))

    def kill(self, run: subprocess.Popen[bytes], left: list[psutil.Process], everything: bool = False) -> None:
        """Kills the command, or all of its processes; waits until the processes `left` by it have ended."""
        end_tree(run) if everything else run.kill()
        for process in psutil.wait_procs(left, timeout=END_S)[1]:
            print(f"{self.folder}: {process} outlived its driver by {END_S:.0f} s", flush=True)
            with contextlib.suppress(psutil.Error):
                process.kill()

    def kill_worker(self, run: subprocess.Popen[bytes], roots: list[int]) -> bool:
        """Kills a process below the roots that runs a task; returns whether there was one before the command ended."""
        found = list[psutil.Process]()
        while run.poll() is None and not (found := at_work(roots)):
            time.sleep(0.005)
        if not found:
            return False
        with contextlib.suppress(psutil.Error):
            self.rng.choice(found).kill()
            return True
        return False

    def kill_node(self, nodes: LocalNodes) -> None:
        """Kills a whole node, and lets another join."""
        lost = self.rng.choice(nodes.nodes[1:])  # the first is the head
        lost.kill()
        nodes.nodes.remove(lost)
        nodes.add()


def at_work(roots: Iterable[int]) -> list[psutil.Process]:
    """Lists the descendants that run tasks at this moment."""
    return [process for root in roots for process in _at_work(root)]


def _at_work(root: int) -> Iterator[psutil.Process]:
    for process in descendants(root):
        with contextlib.suppress(psutil.Error, IndexError):
            if (name := process.cmdline()[0]).startswith("ray::") and not any(word in name for word in NO_TASK):
                yield process
