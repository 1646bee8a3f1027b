"""A run's segments: the data plans that it followed, one after another, beside its receipts.

The first is written when the run starts; `--allow-data-change` adds one at the step where it resumes. What was recorded of
later steps, a future that the new plan undoes, is removed.
"""

from __future__ import annotations

import json

from heliostat.data.dataset import DataPlan
from heliostat.storage import Location

FOLDER = "segments"


def write(run: Location, plan: DataPlan) -> None:
    """Records that the run follows `plan` from its first step on."""
    for folder in (FOLDER, "receipts", "quarantine"):
        for path, _ in run.join(folder).files():
            if _step(path) > plan.first_step:
                run.join(folder, path).delete()
    run.join(FOLDER, f"step-{plan.first_step:08d}.json").write(json.dumps(plan.dump()).encode())


def read(run: Location) -> list[DataPlan]:
    """Every plan that the run has followed, by first step."""
    folder = run.join(FOLDER)
    return [DataPlan.parse(json.loads(folder.join(path).read())) for path, _ in folder.files()]


def _step(name: str) -> int:
    return int(name.removeprefix("step-").partition(".")[0])
