"""Reads the id of a run's MLflow run from `run.json` in the run's folder.

heliostat writes this file before it asks MLflow to create the run, so that a run never gets a second MLflow run.
"""

from __future__ import annotations

from typing import NotRequired, cast

from typing_extensions import TypedDict

from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, open_


@open_
class Made(TypedDict):
    """Describes `run.json`. The file has a `run_id` as soon as MLflow has the run."""

    token: str
    uri: str
    run_id: NotRequired[str]


class MlflowIdRecord(TypedDict, total=False):
    """Describes `run.json`, or an empty record for a new run."""

    token: str
    uri: str
    name: str
    run_id: str


MADE = Format(Made, "record of a run", fix="If you delete this file, the run continues as another run in MLflow")


def record(run: Location) -> MlflowIdRecord:
    """Reads the run's record of its MLflow run (`run.json`); empty for a new run."""
    try:
        return cast(MlflowIdRecord, MADE.read(run.join(run_folder.MLFLOW_RUN)))
    except FileNotFoundError:
        return {}
