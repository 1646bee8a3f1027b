"""What an exported folder is: `heliostat.json` in it names the recipe and the job that made it, so every command that uses a
model goes through its recipe, whatever kind it is. A folder without one is taken for a language model of `transformers`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat import workspace
from heliostat.errors import ConfigError
from heliostat.spec import Job

RECORD = "heliostat.json"
LANGUAGE_MODEL = "jobs.causal_lm:CausalLM"


@dataclass(frozen=True)
class Export:
    """`job` is the one that trained the model; None for a folder that came from elsewhere. `data_version`: of its data plan,
    and so of what was held out; None: not known."""

    folder: Path
    recipe: Any  # the class
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
    try:
        found = json.loads(place.read_text())
        path, job, version = found["recipe"], found["job"], int(found.get("origin", {}).get("data_version", 1))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{place}: is damaged; export the model again") from e
    recipe = workspace.import_path(f"{place}: recipe", path, folder)
    if not isinstance(recipe, type) or not hasattr(recipe, "generator"):
        raise ConfigError(f"{place}: recipe: {path!r} is no recipe")
    return Export(folder, recipe, job, version)
