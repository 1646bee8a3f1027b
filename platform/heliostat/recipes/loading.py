"""Loads the recipe that a job names, bound to its datasets: the only way from `recipe: package.module:Class` to an object."""

from __future__ import annotations

from pathlib import Path

from heliostat.config import workspace
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.recipes.conformance import require_class
from heliostat.recipes.protocol import Recipe


def recipe_class(job: Job, record: Path | None = None) -> type[Recipe]:
    """Imports a job's recipe class; ConfigError if there is none. `record`: the run's folder, if the job comes from its
    record."""
    return require_class("recipe", job.recipe, workspace.import_path("recipe", job.recipe, record))


def load(job: Job, sources: list[Manifest], record: Path | None = None) -> Recipe:
    """Makes a job's recipe and binds it to its datasets; ConfigError if the datasets don't fit the model."""
    recipe = recipe_class(job, record)(job)
    recipe.bind(sources)
    return recipe
