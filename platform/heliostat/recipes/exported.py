"""Writes and reads `heliostat.json`, the record in an exported folder. The record contains the recipe and the job that trained
the model, so every command can use the model through its recipe. heliostat treats a folder without a record as a language model
of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from heliostat.config import workspace
from heliostat.config.spec import Job
from heliostat.errors import ConfigError, HeliostatError
from heliostat.recipes.conformance import require_class
from heliostat.recipes.protocol import GUIDE, Exports, Generated, Generates, Request
from heliostat.storage.records import Format, Whole, open_
from heliostat.text import brief, printable

RECORD, ADAPTER, IMPORT = "heliostat.json", "heliostat_adapter.json", "heliostat_import.json"
LANGUAGE_MODEL = "heliostat.recipes:CausalLM"


@open_
class TrainedFacts(TypedDict):
    """Describes the part of a job that heliostat reads from an exported model's record."""

    name: str
    model: dict[str, object]
    data: dict[str, Any]
    train: dict[str, object]
    evaluate: NotRequired[dict[str, Any] | None]
    card: NotRequired[dict[str, object]]


@open_
class Origin(TypedDict):
    """Describes an exported model's origin: the run that trained the model, and the version of this run's data plan."""

    data_version: NotRequired[Whole]


@open_
class Exported(TypedDict):
    recipe: str
    job: TrainedFacts
    origin: NotRequired[Origin]


EXPORTED = Format(Exported, "record of an exported model", ConfigError, fix="Export the model again")
ADAPTER_ORIGIN = Format(dict[str, object], "record of an exported adapter", ConfigError, fix="Export the adapter again")


@dataclass(frozen=True)
class Export:
    """Describes an exported folder. `job`: the job that trained the model; None for a folder without a record. `data_version`:
    the version of the run's data plan, which determines the held-out samples; None if the version is unknown."""

    folder: Path
    recipe: Any  # a class derived from Recipe and Exports
    job: TrainedFacts | None
    data_version: int | None = None


def write(folder: Path, job: Job, origin: dict[str, object]) -> None:
    """Writes the record of an exported model into its folder. `origin`: the model's run and step."""
    (folder / RECORD).write_text(json.dumps({"recipe": job.recipe, "job": job.dump(), "origin": origin}, indent=1))


@open_
class ConvertedFile(TypedDict):
    """Describes the file from which a folder was converted, by its name and SHA-256."""

    file: str
    digest: str


CONVERTED = Format(ConvertedFile, "record of a converted model", ConfigError, fix="Convert the model again")


def converted_from(folder: Path) -> ConvertedFile | None:
    """Reads the record of a folder that was converted from another format; None for other folders."""
    try:
        return CONVERTED.read(folder / IMPORT)
    except FileNotFoundError:
        return None


def is_model(folder: Path) -> bool:
    return (folder / RECORD).is_file() or (folder / "config.json").is_file()


def read(folder: Path) -> Export:
    """Reads an exported folder. Raises ConfigError if the folder's record is damaged, or if the record's recipe is neither in
    this workspace nor installed."""
    place = folder / RECORD
    if not place.is_file():
        return Export(folder, workspace.import_path("recipe", LANGUAGE_MODEL, folder), None)
    record_read = record(folder)
    recipe = workspace.import_path(f"{place}: recipe", record_read["recipe"], folder)
    if not issubclass(recipe := require_class(f"{place}: recipe", printable(record_read["recipe"]), recipe), Exports):
        raise ConfigError(f"{place}: recipe: {printable(record_read['recipe'])!r} doesn't support export ({GUIDE})")
    return Export(folder, recipe, record_read["job"], record_read.get("origin", {}).get("data_version", 1))


def record(folder: Path) -> Exported:
    """Reads the record of an exported folder, `heliostat.json`. Raises FileNotFoundError if the folder has no record."""
    return EXPORTED.read(folder / RECORD)


def run_of(folder: Path) -> str | None:
    """Returns the id of the MLflow run that trained the model or adapter in a folder. None if the folder has no record."""
    try:
        origin = record(folder).get("origin", {}) if (folder / RECORD).is_file() else ADAPTER_ORIGIN.read(folder / ADAPTER)
    except FileNotFoundError:
        return None
    run_id = origin.get("run_id")
    return run_id if isinstance(run_id, str) else None


def generator(folder: Path, options: dict[str, object]) -> Callable[[list[Request]], list[Generated]]:
    """Loads the generator of an exported model. Raises ConfigError if the model's recipe doesn't answer prompts."""
    recipe = read(folder).recipe
    if not issubclass(recipe, Generates):
        raise ConfigError(
            f"{folder}: {recipe.__name__} models don't answer prompts. Use a model whose recipe derives from Generates ({GUIDE})"
        )
    return recipe.generator(folder, options)


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Converts an error that a library raises inside the context into a one-line ConfigError that names the model's folder."""
    try:
        yield
    except HeliostatError:
        raise
    except Exception as e:
        raise ConfigError(
            f"{folder}: can't load the model ({type(e).__name__}: {brief(e)}). Export or copy the folder again"
        ) from e
