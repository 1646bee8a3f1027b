"""A run's segments: the data plans that it followed, one after another, beside its receipts.

The first is written when the run starts; `--allow-data-change` adds one at the step where it resumes, and so does going back
before a loss spike, whose samples the new plan leaves out. What was recorded of
steps after the one that a run resumes from is removed: they are made anew.
"""

from __future__ import annotations

import itertools
import json

from heliostat.data import plans
from heliostat.data.dataset import DataPlan
from heliostat.errors import DataError
from heliostat.storage import Location

FOLDER = "segments"


def begin(run: Location, plan: DataPlan, step: int) -> None:
    """Records that the run goes on from `step` with `plan`: whatever is recorded of later steps will be made anew."""
    for folder in (FOLDER, "receipts", "quarantine", "curves"):
        for path, _ in run.join(folder).files():
            if step_of(path) > step:
                run.join(folder, path).delete()
    if plan.begins == step:
        run.join(FOLDER, f"step-{step:08d}.json").write(json.dumps(plan.dump()).encode())


def read(run: Location) -> list[DataPlan]:
    """Every plan that the run has followed, by the step at which it began to."""
    folder = run.join(FOLDER)
    found = [plans.read(folder.join(path)) for path, _ in folder.files()]
    if any(a.begins >= b.begins for a, b in itertools.pairwise(found)):
        raise DataError(f"{folder}: the data plans do not begin one after another, as their names say; one is not this run's")
    return found


def step_of(name: str) -> int:
    """The step that a file of a run is named after; DataError for a file that is not named so."""
    number = name.removeprefix("step-").partition(".")[0]
    if not number.isdecimal():
        raise DataError(f"{name}: is not named after a step, as step-00000100.json; take it out of the run's folder")
    return int(number)
