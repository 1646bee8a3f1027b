"""The curves of a run beside its checkpoints, so that a checkpoint never gets ahead of them.

Metrics travel to MLflow through the driver, and one that is killed takes with it what had not arrived. So rank 0 writes the
events of all steps since the last checkpoint to `curves/step-00000100.json` before that checkpoint: whoever opens the run next
logs from there what MLflow lacks.
"""

from __future__ import annotations

import json
from typing import Any

from heliostat.storage import Location
from heliostat.track.points import Point, points

FOLDER = "curves"
MARK = "train/loss"  # of every step: how far MLflow's curves go


def write(run: Location, done: int, events: list[dict[str, Any]]) -> None:
    """The events of the steps up to `done` that no earlier file holds."""
    kept = [{k: v for k, v in event.items() if k not in ("ledger", "images")} for event in events]
    run.join(FOLDER, f"step-{done:08d}.json").write(json.dumps(kept).encode())


def missing(run: Location, known: dict[str, int]) -> list[Point]:
    """In order, all points of the files that end behind the last step that MLflow has."""
    folder, last, out = run.join(FOLDER), known.get(MARK, 0), list[Point]()
    for name, _ in folder.files():
        if int(name.removeprefix("step-").partition(".")[0]) > last:
            for event in json.loads(folder.join(name).read()):
                out += points({"sources": {}, **event})
    return out
