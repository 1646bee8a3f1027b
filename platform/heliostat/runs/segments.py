"""Records a run's segments, next to its receipts. A segment is a range of the run's steps that follow one data plan.

The start of the run writes the first segment. `--allow-data-change` adds a segment at the step where the run resumes. If the run
returns to a checkpoint before a loss spike, this return adds a segment, too, because the new plan leaves out the spike's samples.
When a run resumes from a step, the records of later steps are removed, because these steps are trained again.
"""

from __future__ import annotations

import itertools
import json

from heliostat.data.dataset import DataPlan
from heliostat.errors import DataError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location


def begin(run: Location, plan: DataPlan, step: int) -> None:
    """Records in the run's folder that the run continues from `step` with `plan`.

    Deletes the records of later steps, because these steps are trained again.
    """
    for folder in run_folder.BY_STEP:
        for path, _ in run.join(folder).files():
            if run_folder.step_of(path) > step:
                run.join(folder, path).delete()
    if plan.begins == step:
        run_folder.segment(run, step).write(json.dumps(plan.dump()).encode())


def read(run: Location) -> list[DataPlan]:
    """Reads the data plans that the run has followed, ordered by first step. Raises DataError if the plans are out of order."""
    folder = run.join(run_folder.SEGMENTS)
    followed = [DataPlan.read(folder.join(path)) for path, _ in folder.files()]
    if any(a.begins >= b.begins for a, b in itertools.pairwise(followed)):
        raise DataError(
            f"{folder}: the order of the data plans differs from the order of their file names. "
            "One of the files belongs to another run"
        )
    return followed
