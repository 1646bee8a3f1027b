"""Reads the lineage of synthetic data. If an input is the output of `heliostat model infer`, finds the model that generated this
input."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath
from typing import Any, NotRequired

from typing_extensions import TypedDict

from heliostat.curation.prepare import InputFile
from heliostat.data.ancestry import WRITER
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Whole, open_

log = logging.getLogger(__name__)

FOLDER, RECORD = "answers", "inference.json"  # names that `heliostat model infer` writes, next to each other


@open_
class ModelFacts(TypedDict):
    """Describes the model of a batch inference. `origin`: from `recipes.model_origins`; in older records, only the run and step,
    or missing."""

    folder: str
    digest: str
    origin: NotRequired[dict[str, Any]]


@open_
class File(TypedDict):
    file: str


@open_
class InferenceFacts(TypedDict):
    model: ModelFacts
    engine: dict[str, object]
    settings: dict[str, object]
    input: str
    inputs: str
    answers: Whole
    answers_in: list[File]


TOLD = Format(InferenceFacts, "record of a batch inference", DataError, fix="Run `heliostat model infer` again")


def answers(root: Location, files: list[InputFile]) -> dict[str, object] | None:
    """Returns the model, the settings, and the inputs that generated these files, from `inference.json`. Returns None if the
    files aren't the output of `heliostat model infer`.

    If `inference.json` can't be read or doesn't list the files, logs a warning, and the files have no lineage.
    """
    folder = root if root.name == FOLDER else _above(root)
    if folder.name != FOLDER:
        return None
    record = _above(folder).join(RECORD)
    try:
        facts = TOLD.read(record)
    except FileNotFoundError:
        return None
    except DataError as e:
        log.warning("the dataset doesn't record which model wrote it: %s", e)
        return None
    listed = {PurePosixPath(one["file"]).name for one in facts["answers_in"]}
    if others := {PurePosixPath(file.path or root.name).name for file in files} - listed:
        log.warning(
            "the dataset doesn't record which model wrote it, because %s doesn't list %s. Remove other files from the input",
            record,
            min(others),
        )
        return None
    return {name: value for name, value in facts.items() if name in InferenceFacts.__annotations__ and name != "answers_in"}


def writer(written_by: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Returns the origin of the model in the result of `answers`, as an entry of a dataset's record of its pipeline. Returns {}
    if there is no result."""
    if written_by is None:
        return {}
    model, unknown = written_by["model"], dict.fromkeys(("name", "run_id", "step", "license"))
    return {WRITER: {"folder": model["folder"], "config": "", "bytes": 0, **unknown, **model.get("origin", {})}}


def _above(place: Location) -> Location:
    base, mark, query = place.uri.partition("?") if place.is_s3 else (place.uri, "", "")
    return Location((base.rstrip("/").rpartition("/")[0] or "/") + mark + query)
