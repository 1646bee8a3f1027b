"""Defines the protocol of recipes (`protocol`), and contains the built-in recipes for text and images.

Start at `protocol`.
May import: `checkpoint`, `config`, `data`, `optim`, `parallel`, `storage`.

A job file selects a recipe with `recipe: heliostat.recipes:NAME`. `built_in` finds the names. Each recipe is one file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from heliostat.recipes import built_in

if TYPE_CHECKING:  # so that editors and type checkers know the type of each name
    from heliostat.recipes.images.autoencoder import Autoencoder as Autoencoder
    from heliostat.recipes.images.embedder import ImageEmbedder as ImageEmbedder
    from heliostat.recipes.images.text_to_image import TextToImage as TextToImage
    from heliostat.recipes.text.causal_lm import CausalLM as CausalLM
    from heliostat.recipes.text.dpo import DPO as DPO
    from heliostat.recipes.text.embedder import Embedder as Embedder
    from heliostat.recipes.text.sft import SFT as SFT


def __getattr__(name: str) -> object:
    recipes = built_in.find()
    if name == "__all__":
        return [*recipes]
    if name not in recipes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(recipes[name].module), name)


def __dir__() -> list[str]:
    return [*built_in.find()]
