"""Provides what tests need to strike a run: its processes, its progress, and threads that act at a point of its progress."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from heliostat.checkpoint import layout
from heliostat.storage.locations import Location

from tests.integration.conftest import UNBROKEN_STEPS
from tests.integration.paced import PLAIN
from tests.waiting import until

STEPS = UNBROKEN_STEPS
Strike = tuple[Callable[[], bool], Callable[[], object]]  # when, and what


def settings(**changes: Any) -> list[str]:
    """Returns the settings of a run whose curve is compared with the unbroken one."""
    made = {**PLAIN, "train.steps": STEPS, "evaluate.every": STEPS, "checkpoint.every": 10, "train.log_every": 1}
    made["retries.backoff"] = 0.1
    return [f"{k}={json.dumps(v)}" for k, v in {**made, **changes}.items()]


def run_folder(path: Path) -> Location:
    """Returns the run folder of a job's file."""
    job = yaml.safe_load(path.read_text())
    return Location(job["storage"]).join(job["name"])


def actors(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            if process.name().startswith(f"ray::{name}"[:15]):
                found.append(process)
    return found


def workers() -> list[psutil.Process]:
    return actors("TrainWorker")


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def complete(folder: Location, step: int) -> bool:
    return layout.folder(folder, step).join(layout.INDEX).exists()


def saved(folder: Location) -> int:
    """Returns the step of the newest complete checkpoint."""
    return max((s for s in layout.steps(folder) if complete(folder, s)), default=0)


def when(*strikes: Strike) -> threading.Thread:
    """Starts a thread that acts when each condition holds, one after another; or never."""

    def watch() -> None:
        for condition, act in strikes:
            until(condition, "moment to strike", 240)
            act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
