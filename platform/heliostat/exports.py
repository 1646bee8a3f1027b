"""What an exported folder is: `heliostat.json` in it names the recipe and the job that made it, so every command that uses a
model goes through its recipe, whatever kind it is. A folder without one is taken for a language model of `transformers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from heliostat import workspace
from heliostat.errors import ConfigError, HeliostatError
from heliostat.records import Format, open_
from heliostat.spec import Job
from heliostat.text import brief

RECORD = "heliostat.json"
LANGUAGE_MODEL = "jobs.causal_lm:CausalLM"


@open_
class Trained(TypedDict):
    """What is used of the job that made a model."""

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    evaluate: NotRequired[dict[str, Any] | None]
    card: NotRequired[dict[str, Any]]


@open_
class Exported(TypedDict):
    recipe: str
    job: Trained
    origin: NotRequired[dict[str, Any]]


EXPORTED = Format(Exported, "record of an exported model", ConfigError, fix="export the model again")


@dataclass(frozen=True)
class Export:
    """`job` is the one that trained the model; None for a folder that came from elsewhere."""

    folder: Path
    recipe: Any  # the class
    job: dict[str, Any] | None


def write(folder: Path, job: Job, origin: dict[str, Any]) -> None:
    """`origin`: the run and the step that the model comes from."""
    (folder / RECORD).write_text(json.dumps({"recipe": job.recipe, "job": job.dump(), "origin": origin}, indent=1))


def is_model(folder: Path) -> bool:
    return (folder / RECORD).is_file() or (folder / "config.json").is_file()


def read(folder: Path) -> Export:
    """ConfigError if the record is damaged, or its recipe is not in this workspace."""
    place = folder / RECORD
    if not place.is_file():
        return Export(folder, workspace.import_path("recipe", LANGUAGE_MODEL), None)
    found = record(folder)
    return Export(folder, workspace.import_path(f"{place}: recipe", found["recipe"]), dict(found["job"]))


def record(folder: Path) -> Exported:
    """What `heliostat.json` says; FileNotFoundError if the folder has none."""
    return EXPORTED.read(folder / RECORD)


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Around the use of a model: what a library says of a folder that it cannot use is one line that names it."""
    try:
        yield
    except HeliostatError:
        raise
    except Exception as e:
        raise ConfigError(f"{folder}: the model cannot be used ({type(e).__name__}: {brief(e)})") from e
