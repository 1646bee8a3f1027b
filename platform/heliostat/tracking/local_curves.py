"""Keeps a run's curves next to its checkpoints, so that a checkpoint never gets ahead of them.

Metrics travel to MLflow through the driver, and one that is killed takes with it what had not arrived. So rank 0 writes the
events of all steps since the last checkpoint to `curves/step-00000100.json` before that checkpoint: the process that opens the
run next logs from there what MLflow lacks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import NotRequired

from typing_extensions import TypedDict

from heliostat.runs import events
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Number, open_
from heliostat.tracking.metrics import Point, points

log = logging.getLogger(__name__)

MARK = "train/loss"  # of every step: how far MLflow's curves go


FIX = "Delete it to continue without these steps' curves"


@open_
class RecordedEvent(TypedDict):
    kind: str
    at: Number
    scores: NotRequired[dict[str, float | None]]  # null: what an earlier version could not measure


def _fault(event: events.Event) -> str | None:
    if not isinstance(event, events.Steps):
        return None
    curves = [event.lr, event.grad_norm, *event.added.values()]
    if not event.loss or any(len(curve) != len(event.loss) for curve in curves):
        return "its loss, lr, grad_norm, and added values have different numbers of steps"
    return None


LIST = Format(list[RecordedEvent], "list of a run's curves", fix=FIX)
KINDS = {kind: Format(cls, "event of a run", check=_fault, fix=FIX) for kind, cls in events.RECORDED.items()}


def write(run: Location, done: int, reported: Sequence[events.Event]) -> None:
    """Writes the events of the steps up to `done` that no earlier file of the run's curves holds."""
    run_folder.curves(run, done).write(json.dumps([events.dump(event) for event in reported]).encode())


def missing(run: Location, known: dict[str, int]) -> list[Point]:
    """Reads the points that MLflow may lack: of all files that end behind the last step that MLflow has, in order."""
    return read(run, known.get(MARK, 0))


def read(run: Location, last: int = 0) -> list[Point]:
    """Reads all points of the curve files that end behind the step `last`, in order."""
    folder, out = run.join(run_folder.CURVES), list[Point]()
    for name, _ in folder.files():
        if run_folder.step_of(name) > last:
            place = folder.join(name)
            for number, event in enumerate(LIST.read(place)):
                if (recorded := KINDS.get(event["kind"])) is None:
                    log.warning(
                        "%s: an event of kind %r comes from another version of heliostat and isn't logged", name, event["kind"]
                    )
                    continue
                if scores := event.get("scores"):
                    event["scores"] = {name: score for name, score in scores.items() if score is not None}
                out += points(recorded.build(event, f"{place}: {number}"))
    return out
