"""Measures recovery in place: the seconds from a fault to the next new step, by part.

    python -m tests.benchmarks.recovery [--fault kill] [--job jobs/chaos.yaml] [--times 3] [--set train.zero.stage=3]

In one run, the fault strikes again after some more steps:

    kill     SIGKILL to a worker; a new process replaces it
    resize   three workers become two after a checkpoint, two become three, and so on; from the last step of the one to the first
             of the other, the checkpoint included
    node     a cluster of local nodes, one worker on each: all processes of one are killed; the others continue without it. Then a
             new node joins, and the run grows again

The parts, in order:

    ended        until the other workers have returned, and the driver knows it
    pause        reading the newest checkpoint's index, and retries.backoff after a first retry
    processes    until the new workers' processes have answered, and rank 0's loop begins in the new process group
    model        building the model and the engine
    checkpoint   loading the checkpoint
    data         until the first batch is available
    first step   until the first step is done
    recomputed   until the first step that hadn't been made before
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from heliostat.chaos.nodes import LocalNodes
from heliostat.chaos.process import workers
from heliostat.runs.events import Event, Phase, Steps
from heliostat.training import run
from heliostat.training.driver import attempt, orders, progress
from heliostat.training.driver import run as driver_run

from tests.benchmarks import harness

PARTS = ("ended", "pause", "processes", "model", "checkpoint", "data", "first step", "recomputed")
PHASES = {
    "placing": "pause",
    "model": "processes",
    "restore": "model",
    "data": "checkpoint",
    "step": "data",
    "stepped": "first step",
}  # fmt: skip (the part that the phase's beginning ends)
ELASTIC = ["workers.count=[2, 3]", "train.global_batch_size=24", "data.virtual_ranks=6"]


class Recording(progress.ProgressReporter):
    """Records every event of the terminal's view with its time."""

    events: list[tuple[str, float, int]] = []

    def event(self, event: Event) -> None:
        if isinstance(event, Phase):
            self.keep(event.phase, event.at, 0)
        elif isinstance(event, Steps):
            self.keep("made", event.at, event.done)
        super().event(event)

    def keep(self, *event: Any) -> None:
        self.events.append(event)
        if "--follow" in sys.argv:
            print(json.dumps(event), flush=True)


events = Recording.events


def split(struck: float, ended: float) -> dict[str, float]:
    """Returns the seconds by part, for the recovery from one fault. `ended`: when the driver knew that the attempt had ended."""
    before = max(step for kind, at, step in events if kind == "made" and at <= ended)
    marks = [("ended", ended)]
    for phase, part in PHASES.items():
        marks.append((part, next((at for kind, at, _ in events if kind == phase and at > ended), marks[-1][1])))
    marks.append(("recomputed", next(at for kind, at, step in events if kind == "made" and at > ended and step > before)))
    ends = [struck, *(at for _, at in marks)]
    return {part: end - start for (part, end), start in zip(marks, ends, strict=False)}


def made() -> int:
    return max((step for kind, _, step in events if kind == "made"), default=0)


def starts() -> int:
    return sum(kind == "stepped" for kind, _, _ in events)


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def kill(times: int, struck: list[float]) -> None:
    for number in range(1, times + 1):
        until(lambda number=number: made() >= 13 * number)
        workers(psutil.Process().pid)[-1].kill()
        struck.append(time.time())
        until(lambda number=number: starts() > number)


def kill_nodes(nodes: LocalNodes, times: int, struck: list[float]) -> None:
    for number in range(1, times + 1):
        until(lambda number=number: starts() >= 2 * number - 1)
        since = made()
        until(lambda since=since: made() >= since + 8)
        lost = next(node for node in reversed(nodes.nodes) if node.workers())
        struck.append(time.time())
        lost.kill()
        nodes.nodes.remove(lost)
        until(lambda number=number: starts() >= 2 * number)
        if number < times:
            nodes.add()


def alternate() -> None:
    """Makes every attempt stop after its next checkpoint, and gives the next one another number of workers."""
    counts, look = iter([3, 2] * 1000), attempt.Attempt._look
    attempt.LOOK_S = 0.2
    driver_run.choose = lambda allowed, room: next(counts)

    def order(self: attempt.Attempt) -> None:
        look(self)
        self._decide(orders.RoomFound(self.job.workers.most))  # if they make steps, and are not ordered to stop yet

    attempt.Attempt._look = order  # type: ignore[method-assign]


def train(options: Any, folder: str) -> list[Any]:
    """Trains with the recording view; returns the ledger's attempts."""
    settings = [f"storage={folder}", f"mlflow.uri=sqlite:///{folder}/mlflow.db", "name=recovery", "train.log_every=1",
                "mlflow.register=null", *([] if options.fault == "kill" else ELASTIC),
                *(["workers.placement=strict_spread"] if options.fault == "node" else []), *options.set]  # fmt: skip
    run.train(options.job, settings)
    from heliostat.runs import goodput
    from heliostat.storage.locations import Location

    return sorted(goodput.read(Location(folder).join("recovery")), key=lambda a: a.started)


def followed(environment: dict[str, str]) -> list[float]:
    """Trains in a process that joins a cluster; returns when the failed attempts ended."""
    command = [sys.executable, "-m", "tests.benchmarks.recovery", *sys.argv[1:], "--follow"]
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        for line in driver.stdout:
            told = json.loads(line) if line.startswith(("[", "{")) else []
            if isinstance(told, dict):
                return told["ended"]
            if told:
                events.append(tuple(told))
    raise SystemExit("the run did not end as it should")


def strike(options: Any, folder: str) -> list[dict[str, float]]:
    """Runs the job with its faults; returns the cost of each, by part."""
    struck: list[float] = []
    if options.fault == "resize":
        alternate()
        found = [a for a in train(options, folder) if a.outcome == "resize"]
        last = [max(at for kind, at, _ in events if kind == "made" and at < a.seen) for a in found]
        return [split(at, a.seen) for at, a in zip(last, found, strict=True)][1 : options.times + 1]
    if options.fault == "kill":
        threading.Thread(target=kill, args=(options.times, struck), daemon=True).start()
        ended = [a.seen for a in train(options, folder) if a.outcome == "failed"]
    else:
        with LocalNodes(Path(folder), 3, 3) as nodes:
            threading.Thread(target=kill_nodes, args=(nodes, options.times, struck), daemon=True).start()
            ended = followed(nodes.environment)
    return [split(at, next(f for f in ended if f > at)) for at in struck]


def main() -> None:
    options = harness.arguments(
        __doc__, fault={"choices": ("kill", "resize", "node"), "default": "kill"}, times=3,
        job={"type": Path, "default": Path("jobs/chaos.yaml")}, set={"action": "append", "default": []}, follow=False,
    )  # fmt: skip
    progress.ProgressReporter = Recording  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        if options.follow:
            print(json.dumps({"ended": [a.seen for a in train(options, folder) if a.outcome == "failed"]}))
            return
        found = strike(options, folder)
    harness.head("part", *(f"{options.fault} {i + 1}" for i in range(len(found))), "median")
    rows = {part: [one[part] for one in found] for part in PARTS}
    for part, seconds in (rows | {"fault to next new step": [sum(one.values()) for one in found]}).items():
        harness.row(part, *(f"{s:.2f}" for s in seconds), f"{median(seconds):.2f}")


if __name__ == "__main__":
    main()
