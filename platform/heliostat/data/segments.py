"""A run's segments: the data plans that it followed, one after another, beside its receipts.

The first is written when the run starts; `--allow-data-change` adds one at the step where it resumes, and so does going back
before a loss spike, whose samples the new plan leaves out. What was recorded of
steps after the one that a run resumes from is removed: they are made anew.
"""

from __future__ import annotations

import json

from heliostat.data.dataset import DataPlan
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
    return [DataPlan.parse(json.loads(folder.join(path).read())) for path, _ in folder.files()]


def step_of(name: str) -> int:
    """The step that a file of a run is named after."""
    return int(name.removeprefix("step-").partition(".")[0])
