"""Finds the package's built-in recipes by reading their source files. This module doesn't import the recipes, because such an
import would import torch.

A module of `text` or `images` declares its recipe as `BUILT_IN = {"CausalLM": ("transformers",)}`. The key is the name of the
class. The value lists the modules and libraries that the recipe imports lazily.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = "heliostat.recipes"
FOLDERS = ("text", "images")
MARK = re.compile(r"^BUILT_IN = (\{.*?\})$", re.M | re.S)
LIBRARIES = {  # by library: the modules that a recipe imports when it builds a model with the library
    "transformers": (
        "transformers.modeling_utils",
        "transformers.models.{arch}.modeling_{arch}",
        "transformers.integrations.deepspeed",
    ),
    "diffusers": ("diffusers.models.unets", "diffusers.models.transformers", "diffusers.models.autoencoders"),
}


class BuiltIn(NamedTuple):
    """Describes a built-in recipe: the recipe's module, and the modules and libraries that the recipe imports lazily (`late`)."""

    module: str
    late: tuple[str, ...]


@cache
def find(folder: Path = Path(__file__).parent) -> dict[str, BuiltIn]:
    """Returns the recipes in the subfolders of a folder, by name in alphabetical order."""
    recipes = dict[str, BuiltIn]()
    for file in (file for kind in FOLDERS for file in (folder / kind).glob("*.py")):
        if declared := MARK.search(file.read_text("utf-8")):
            module = f"{PACKAGE}.{file.parent.name}.{file.stem}"
            recipes |= {name: BuiltIn(module, late) for name, late in ast.literal_eval(declared[1]).items()}
    return dict(sorted(recipes.items()))


def modules(recipe: str, model: Mapping[str, object]) -> list[str]:
    """Lists the modules that workers import for a job's `recipe` and `model`. A fork server can import these modules in advance.

    The list is empty for a custom recipe, because importing custom code may have side effects. The fork server skips modules that
    it can't import.
    """
    from heliostat.config import workspace  # imported here, because the import takes longer than finding all recipes

    module, _, name = recipe.partition(":")
    if workspace.BUILT_IN.get(module, module) != PACKAGE or name not in find():
        return []
    home, late = find()[name]
    modules = [module for each in late for module in LIBRARIES.get(each, (each,))]
    return [home, *(module.format(arch=model.get("arch", "auto")) for module in modules)]
