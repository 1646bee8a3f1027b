"""Recovery from a killed worker: seconds from the kill to the next new step, and where they go.

    python tests/benchmarks/recovery.py [--job jobs/chaos.yaml] [--kills 3] [--set train.zero.stage=3]

One run, in which a worker is killed each time that some more steps are done. The parts, in their order:

    ended        until the other workers have come back, and the driver has heard of it
    pause        reading the newest checkpoint's index, and retries.backoff behind a first retry
    processes    until the dead worker's new process has answered, and rank 0's loop begins in the new process group
    model        building it, and the engine
    checkpoint   loading it
    data         until the first batch is there
    first step   until the first step is done
    recomputed   until the first step that had not been made before
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil
from heliostat.chaos.process import workers
from heliostat.events import Event, Phase, Steps
from heliostat.train import run
from heliostat.train.driver import progress

PARTS = ("ended", "pause", "processes", "model", "checkpoint", "data", "first step", "recomputed")
PHASES = {
    "placing": "pause",
    "model": "processes",
    "restore": "model",
    "data": "checkpoint",
    "step": "data",
    "stepped": "first step",
}  # fmt: skip (the part that the phase's beginning ends)


class Recording(progress.ProgressReporter):
    """The terminal's view, which also keeps every event with its time."""

    events: list[tuple[str, float, int]] = []

    def event(self, event: Event) -> None:
        if isinstance(event, Phase):
            self.events.append((event.phase, event.at, 0))
        elif isinstance(event, Steps):
            self.events.append(("made", event.at, event.done))
        super().event(event)


def split(killed: float, failed: float, events: list[tuple[str, float, int]]) -> dict[str, float]:
    """Seconds by part, for the recovery from one kill. `failed`: when the driver had the error."""
    before = max(step for kind, at, step in events if kind == "made" and at <= failed)
    marks = [("ended", failed)]
    for phase, part in PHASES.items():
        marks.append((part, next(at for kind, at, _ in events if kind == phase and at > failed)))
    marks.append(("recomputed", next(at for kind, at, step in events if kind == "made" and at > failed and step > before)))
    ends = [killed, *(at for _, at in marks)]
    return {part: end - start for (part, end), start in zip(marks, ends, strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=Path("jobs/chaos.yaml"))
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    progress.ProgressReporter = Recording  # type: ignore[misc]
    killed: list[float] = []
    events = Recording.events

    def kill() -> None:
        for number in range(1, options.kills + 1):
            while max((step for kind, _, step in events if kind == "made"), default=0) < 13 * number:
                time.sleep(0.01)
            workers(psutil.Process().pid)[-1].kill()
            killed.append(time.time())
            while not any(kind == "stepped" and at > killed[-1] for kind, at, _ in events):
                time.sleep(0.05)

    threading.Thread(target=kill, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"storage={folder}", f"mlflow.uri=sqlite:///{folder}/mlflow.db", "name=recovery", "train.log_every=1",
                    "mlflow.register=null", *options.set]  # fmt: skip
        run.train(options.job, settings)
        from heliostat.runs import goodput
        from heliostat.storage import Location

        ended = sorted(a.seen for a in goodput.read(Location(folder).join("recovery")) if a.outcome == "failed")
    found = [split(at, next(f for f in ended if f > at), events) for at in killed]
    print(f"| part | {' | '.join(f'kill {i + 1}' for i in range(len(found)))} | median |")
    print("|---|" + "---:|" * (len(found) + 1))
    for part in PARTS:
        print(f"| {part} | {' | '.join(f'{one[part]:.2f}' for one in found)} | {median(one[part] for one in found):.2f} |")
    totals = [sum(one.values()) for one in found]
    print(f"| kill to next new step | {' | '.join(f'{t:.2f}' for t in totals)} | {median(totals):.2f} |")


if __name__ == "__main__":
    main()
