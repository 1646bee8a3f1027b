"""Reads what benchmarks say of a run's checkpoints: `benchmarks/SUITE/step-*.json` in its folder, which come after the save."""

from __future__ import annotations

import math

from typing_extensions import TypedDict

from heliostat.config.checkpoint_section import BENCHMARK
from heliostat.errors import DataError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, open_


@open_
class Row(TypedDict):
    """Describes a task's score."""

    task: str
    score: float


@open_
class Result(TypedDict):
    """Describes what retention reads of a result. `written`: when its checkpoint was."""

    written: float
    tasks: list[Row]


RESULT = Format(Result, "result of a benchmark", DataError, fix="delete it, and its checkpoint is scored again")


def score(run: Location, step: int, written: float, metric: str) -> float:
    """Reads a benchmark's score of the checkpoint of a step that was written at this time; nan if there is none."""
    for suite in run.join(run_folder.BENCHMARKS).folders():
        try:
            found = RESULT.read(run_folder.benchmark(run, suite, step))
        except (FileNotFoundError, DataError):
            continue  # not scored yet, or not whole: no reason to stop a run that trains
        for row in found["tasks"] if found["written"] == written else ():
            if f"{BENCHMARK}{row['task']}" == metric:
                return row["score"]
    return math.nan
