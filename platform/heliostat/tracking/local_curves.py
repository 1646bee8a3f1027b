"""Keeps a run's curves beside its checkpoints, so that a checkpoint never gets ahead of them.

Metrics travel to MLflow through the driver, and one that is killed takes with it what had not arrived. So rank 0 writes the
events of all steps since the last checkpoint to `curves/step-00000100.json` before that checkpoint: whoever opens the run next
logs from there what MLflow lacks.
"""

from __future__ import annotations

import json
import logging
from typing import NotRequired

from typing_extensions import TypedDict

from heliostat.runs import events
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Number, Whole, open_
from heliostat.tracking.metrics import Point, points

log = logging.getLogger(__name__)

MARK = "train/loss"  # of every step: how far MLflow's curves go


@open_
class RecordedCurve(TypedDict):
    kind: str
    at: Number
    step: NotRequired[Whole]
    first: NotRequired[Whole]
    loss: NotRequired[list[float] | float]  # of steps; of a spike
    lr: NotRequired[list[float]]
    grad_norm: NotRequired[list[float]]
    seconds: NotRequired[Number]
    tokens_per_second: NotRequired[float | None]
    data_wait: NotRequired[float | None]
    mfu: NotRequired[float | None]
    bad_samples: NotRequired[float | None]
    sources: NotRequired[dict[str, dict[str, float]]]
    scores: NotRequired[dict[str, float | None]]
    blocked_s: NotRequired[float]
    added: NotRequired[dict[str, list[float]]]
    skipped_steps: NotRequired[float | None]
    loss_scale: NotRequired[float | None]
    usual: NotRequired[float]
    limit: NotRequired[float]
    action: NotRequired[str]


NEEDED = {
    "steps": ("first", "loss", "lr", "grad_norm", "seconds"),
    "evaluation": ("step", "scores"),
    "checkpoint": ("step", "blocked_s"),
    "spike": ("step", "loss", "limit"),
}


def _fault(read: list[RecordedCurve]) -> str | None:
    for number, event in enumerate(read):
        if missing := [key for key in NEEDED.get(event["kind"], ()) if key not in event]:
            return f"{number}: an event of kind {event['kind']!r} has no {missing[0]!r}"
        losses = event.get("loss")
        if event["kind"] == "spike" and isinstance(losses, list):
            return f"{number}: a spike has one loss"
        if event["kind"] == "steps":
            curves = [losses, event["lr"], event["grad_norm"], *event.get("added", {}).values()]
            if not isinstance(losses, list) or not losses or any(len(c) != len(losses) for c in curves if isinstance(c, list)):
                return f"{number}: its loss, lr, grad_norm and what is added are not of as many steps"
    return None


EVENTS = Format(list[RecordedCurve], "list of a run's curves", check=_fault, fix="delete it to go without these steps' curves")


def write(run: Location, done: int, reported: list[events.Event]) -> None:
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
            for event in EVENTS.read(folder.join(name)):
                if (parsed := events.parse(event)) is None:
                    log.warning(
                        "%s: an event of kind %r is of another version of heliostat; it is not logged", name, event["kind"]
                    )
                    continue
                out += points(parsed)
    return out
