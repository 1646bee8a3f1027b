"""Keeps a run's curves next to its checkpoints, so that the curves always reach the newest checkpoint.

The driver sends metrics to MLflow, and a killed driver loses the metrics that it hasn't sent yet. So before each checkpoint,
rank 0 writes the events of all steps since the previous checkpoint to `curves/step-00000100.json`. The next process that opens
the run logs the events that MLflow lacks.
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

MARK = "train/loss"  # every step has this metric, so it shows how far MLflow's curves reach


FIX = "Delete the file to continue without these steps' curves"


@open_
class RecordedEvent(TypedDict):
    kind: str
    at: Number
    scores: NotRequired[dict[str, float | None]]  # null if an older version couldn't measure it


def _fault(event: events.Event) -> str | None:
    if not isinstance(event, events.Steps):
        return None
    curves = [event.lr, event.grad_norm, *event.added.values()]
    if not event.loss or any(len(curve) != len(event.loss) for curve in curves):
        return "the event's loss, lr, grad_norm, and added values have different numbers of steps"
    return None


LIST = Format(list[RecordedEvent], "list of a run's curves", fix=FIX)
KINDS = {kind: Format(cls, "event of a run", check=_fault, fix=FIX) for kind, cls in events.RECORDED.items()}


def write(run: Location, done: int, reported: Sequence[events.Event]) -> None:
    """Writes a curve file for the steps up to `done`. `reported`: the events since the previous curve file."""
    run_folder.curves(run, done).write(json.dumps([events.dump(event) for event in reported]).encode())


def missing(run: Location, known: dict[str, int]) -> list[Point]:
    """Reads the points that MLflow may lack, in order. These points are in the curve files that end after MLflow's last
    step."""
    return read(run, known.get(MARK, 0))


def read(run: Location, last: int = 0) -> list[Point]:
    """Reads all points of the curve files that end after the step `last`, in order."""
    folder, out = run.join(run_folder.CURVES), list[Point]()
    for name, _ in folder.files():
        if run_folder.step_of(name) > last:
            place = folder.join(name)
            for number, event in enumerate(LIST.read(place)):
                if (recorded := KINDS.get(event["kind"])) is None:
                    log.warning(
                        "%s: an event of kind %r comes from another version of heliostat, so it isn't logged", name, event["kind"]
                    )
                    continue
                if scores := event.get("scores"):
                    event["scores"] = {name: score for name, score in scores.items() if score is not None}
                out += points(recorded.build(event, f"{place}: {number}"))
    return out
