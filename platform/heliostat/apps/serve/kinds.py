"""Tells which kinds of models are served: those that write, those that draw, and those that embed texts."""

from __future__ import annotations

from pathlib import Path

from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.images import clip_folder
from heliostat.recipes.protocol import Paints
from heliostat.recipes.text import sentence_folder

TEXT, IMAGES, EMBEDDINGS = "text", "images", "embeddings"


def of(folder: Path) -> str:
    """Returns a model's kind; ConfigError if it is of none that is served."""
    if sentence_folder.embeds(folder) or clip_folder.is_one(folder):
        return EMBEDDINGS
    recipe = exported.read(folder).recipe
    if getattr(recipe, "kind", None) == "tokens":
        return TEXT
    if issubclass(recipe, Paints):
        return IMAGES
    raise ConfigError(f"{folder}: is of {recipe.__name__}, and only models that write, draw or embed texts are served")
