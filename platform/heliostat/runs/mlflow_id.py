"""Reads which MLflow run belongs to a run: `run.json` in its folder.

The file is written before MLflow is asked, so that there is never a second MLflow run.
"""

from __future__ import annotations

from typing import NotRequired, cast

from typing_extensions import TypedDict

from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, open_


@open_
class Made(TypedDict):
    """Describes `run.json`; `run_id` is there as soon as MLflow has the run."""

    token: str
    uri: str
    run_id: NotRequired[str]


class MlflowIdRecord(TypedDict, total=False):
    """Describes the same, or nothing of a new run."""

    token: str
    uri: str
    name: str
    run_id: str


MADE = Format(Made, "record of a run", fix="Delete it, and the run continues as another one in MLflow")


def record(run: Location) -> MlflowIdRecord:
    """Reads the run's record of its MLflow run (`run.json`); empty for a new run."""
    try:
        return cast(MlflowIdRecord, MADE.read(run.join(run_folder.MLFLOW_RUN)))
    except FileNotFoundError:
        return {}
