"""Loads the recipe that a job names, and binds the recipe to the job's datasets.

No other module converts `recipe: package.module:Class` to an object.
"""

from __future__ import annotations

from pathlib import Path

from heliostat.config import pretrained, workspace
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.recipes.conformance import require_class
from heliostat.recipes.protocol import Recipe


def recipe_class(job: Job, record: Path | None = None) -> type[Recipe]:
    """Imports a job's recipe class. Raises ConfigError if this class doesn't exist or isn't a recipe. `record`: the run's folder,
    if the job comes from the record of a run."""
    return require_class("recipe", job.recipe, workspace.import_path("recipe", job.recipe, record))


def make(cls: type[Recipe], job: Job, weights: bool = False) -> Recipe:
    """Makes a job's recipe. Before that, downloads the job's Hub models to this machine. Without `weights`, downloads only
    configurations and tokenizers."""
    return cls(pretrained.located(job, weights))


def load(job: Job, sources: list[Manifest], record: Path | None = None, weights: bool = True) -> Recipe:
    """Makes a job's recipe, and binds the recipe to the job's datasets. Raises ConfigError if the datasets don't fit the
    model."""
    recipe = make(recipe_class(job, record), job, weights)
    recipe.bind(sources)
    return recipe
