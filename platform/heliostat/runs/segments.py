"""Keeps a run's segments: the data plans that it followed, one after another, next to its receipts.

The first is written when the run starts; `--allow-data-change` adds one at the step where it resumes, and so does going back
before a loss spike, whose samples the new plan leaves out. What was recorded of steps after the one that a run resumes from is
removed, because they are trained again.
"""

from __future__ import annotations

import itertools
import json

from heliostat.data.dataset import DataPlan
from heliostat.errors import DataError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location


def begin(run: Location, plan: DataPlan, step: int) -> None:
    """Marks in the run's folder that the run continues from `step` with `plan`.

    Deletes whatever is recorded of later steps, because they are trained again.
    """
    for folder in run_folder.BY_STEP:
        for path, _ in run.join(folder).files():
            if run_folder.step_of(path) > step:
                run.join(folder, path).delete()
    if plan.begins == step:
        run_folder.segment(run, step).write(json.dumps(plan.dump()).encode())


def read(run: Location) -> list[DataPlan]:
    """Reads every data plan that the run has followed, by the step at which each began; DataError if they are out of order."""
    folder = run.join(run_folder.SEGMENTS)
    followed = [DataPlan.read(folder.join(path)) for path, _ in folder.files()]
    if any(a.begins >= b.begins for a, b in itertools.pairwise(followed)):
        raise DataError(
            f"{folder}: the data plans don't follow one another as their names say. One of them belongs to another run"
        )
    return followed
