"""Measures CPU seconds and memory of a child and all its descendants during a delivery, sampled with psutil.

CPU: the time of every process of the tree at its last sample; a process that ends loses at most its last 0.2 s. Memory: the
highest sum of PSS (shared pages counted once), sampled once per second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil

from tests.benchmarks.harness import ROOT
from tests.benchmarks.ingest_contenders.child import MARK
from tests.benchmarks.ingest_contenders.task import Task

EVERY_S, MEMORY_EVERY_S, DEADLINE_S = 0.2, 1.0, 300.0


class Meter(threading.Thread):
    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(root)
        self.cpu: dict[tuple[int, float], float] = {}
        self.peak = 0
        self.seen: list[tuple[float, float]] = []  # (monotonic clock, CPU seconds of the tree)
        self._stop_now = threading.Event()
        self._look()

    def _look(self, memory: bool = True) -> None:
        total = 0
        for process in [self.root, *self.root.children(recursive=True)]:
            try:
                used = process.cpu_times()
                self.cpu[process.pid, process.create_time()] = used.user + used.system
                total += process.memory_full_info().pss if memory else 0
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        self.peak = max(self.peak, total)
        self.seen.append((time.monotonic(), sum(self.cpu.values())))

    def run(self) -> None:
        looked = time.monotonic()
        while not self._stop_now.wait(EVERY_S):
            memory = time.monotonic() - looked > MEMORY_EVERY_S
            self._look(memory)
            looked = time.monotonic() if memory else looked

    def end(self) -> None:
        self._stop_now.set()
        self.join()
        self._look()

    def used_since(self, moment: float) -> float:
        """Returns the CPU seconds of the tree from a moment to the end, interpolated between two samples."""
        times, used = zip(*self.seen, strict=True)
        return used[-1] - float(np.interp(moment, times, used))


def measure(task: Task, log: Path) -> dict[str, float]:
    """Runs a contender once; RuntimeError with the end of its log if it fails or delivers late."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "RAY_worker_niceness": "0",  # Ray would run its workers at 15, and the others run at 0
        "HF_HUB_OFFLINE": "1",
        "INGEST_PORT": str(20_000 + os.getpid() % 10_000),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.benchmarks.ingest_contenders.child", task.dump()]
    with log.open("w") as errors:
        child = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=task.scratch
        )
        watchdog = threading.Timer(DEADLINE_S, _kill, [child.pid])
        watchdog.start()
        try:
            _await(child, "ready", log)
            meter = Meter(child.pid)
            meter.start()
            _tell(child, "go")
            done = _await(child, "done", log)
            meter.end()
            _tell(child, "end")
            child.wait(60)
        finally:
            watchdog.cancel()
            if child.poll() is None:
                _kill(child.pid)
    seen, since = done["consumers"], done["since"]
    middle = [fmean(c[part] for c in seen) for part in ("quarter", "three_quarters")]
    return {
        "count": sum(c["count"] for c in seen),
        "sum": sum(c["sum"] for c in seen),
        "seconds": max(c["last"] for c in seen) - since,
        "first": max(c["first"] for c in seen) - since,  # when every consumer has its first batch
        "steady": sum(c["between"] / (c["three_quarters"] - c["quarter"]) for c in seen),
        "cpu": meter.used_since(since),
        "steady_cpu": (meter.used_since(middle[0]) - meter.used_since(middle[1])) / sum(c["between"] for c in seen),
        "peak": meter.peak,
    }


def _kill(root: int) -> None:
    for process in [*psutil.Process(root).children(recursive=True), psutil.Process(root)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _tell(child: subprocess.Popen, word: str) -> None:
    assert child.stdin
    child.stdin.write(f"{word}\n")
    child.stdin.flush()


def _await(child: subprocess.Popen, event: str, log: Path) -> dict[str, Any]:
    assert child.stdout
    for line in child.stdout:
        if line.startswith(MARK) and (found := json.loads(line.removeprefix(MARK)))["event"] == event:
            return found
    raise RuntimeError(f"{child.args!r} ended before {event!r}:\n{log.read_text()[-2000:]}")
