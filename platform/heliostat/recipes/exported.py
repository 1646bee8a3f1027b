"""What an exported folder is: `heliostat.json` in it names the recipe and the job that made it, so every command that uses a
model goes through its recipe, whatever kind it is. A folder without one is taken for a language model of `transformers`.
"""

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
from heliostat.records import Format, Whole, open_
from heliostat.text import brief, printable

RECORD = "heliostat.json"
LANGUAGE_MODEL = "heliostat.recipes:CausalLM"


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
class Origin(TypedDict):
    """Where the model comes from: its run, and the version of its data plan."""

    data_version: NotRequired[Whole]


@open_
class Exported(TypedDict):
    recipe: str
    job: Trained
    origin: NotRequired[Origin]


EXPORTED = Format(Exported, "record of an exported model", ConfigError, fix="export the model again")


@dataclass(frozen=True)
class Export:
    """`job` is the one that trained the model; None for a folder that came from elsewhere. `data_version`: of its data plan,
    and so of what was held out; None: not known."""

    folder: Path
    recipe: Any  # the class: a Recipe that Exports
    job: dict[str, Any] | None
    data_version: int | None = None


def write(folder: Path, job: Job, origin: dict[str, Any]) -> None:
    """`origin`: the run and the step that the model comes from."""
    (folder / RECORD).write_text(json.dumps({"recipe": job.recipe, "job": job.dump(), "origin": origin}, indent=1))


def is_model(folder: Path) -> bool:
    return (folder / RECORD).is_file() or (folder / "config.json").is_file()


def read(folder: Path) -> Export:
    """ConfigError if the record is damaged, or its recipe is neither in this workspace nor installed."""
    place = folder / RECORD
    if not place.is_file():
        return Export(folder, workspace.import_path("recipe", LANGUAGE_MODEL, folder), None)
    found = record(folder)
    recipe = workspace.import_path(f"{place}: recipe", found["recipe"], folder)
    if not issubclass(recipe := require_class(f"{place}: recipe", printable(found["recipe"]), recipe), Exports):
        raise ConfigError(f"{place}: recipe: {printable(found['recipe'])!r} is not exported ({GUIDE})")
    return Export(folder, recipe, dict(found["job"]), found.get("origin", {}).get("data_version", 1))


def record(folder: Path) -> Exported:
    """What `heliostat.json` says; FileNotFoundError if the folder has none."""
    return EXPORTED.read(folder / RECORD)


def generator(folder: Path, options: dict[str, Any]) -> Callable[[list[Request]], list[Generated]]:
    """What answers requests with the model in a folder; ConfigError if its kind answers none."""
    recipe = read(folder).recipe
    if not issubclass(recipe, Generates):
        raise ConfigError(f"{folder}: is of {recipe.__name__}, which answers no prompts")
    return recipe.generator(folder, options)


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Around the use of a model: what a library says of a folder that it cannot use is one line that names it."""
    try:
        yield
    except HeliostatError:
        raise
    except Exception as e:
        raise ConfigError(f"{folder}: the model cannot be used ({type(e).__name__}: {brief(e)})") from e
