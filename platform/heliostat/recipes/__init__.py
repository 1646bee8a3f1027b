"""Defines what a recipe is (`protocol`), and holds the built-in recipes: text and images.

Start at `protocol`.
May import: `checkpoint`, `config`, `data`, `parallel`, `storage`.

A job file names a recipe as `recipe: heliostat.recipes:NAME`.
"""

from typing import TYPE_CHECKING

from heliostat import extras

if TYPE_CHECKING:
    from heliostat.recipes.images.autoencoder import Autoencoder
    from heliostat.recipes.images.embedder import ImageEmbedder
    from heliostat.recipes.images.text_to_image import TextToImage
    from heliostat.recipes.text.causal_lm import CausalLM
    from heliostat.recipes.text.embedder import Embedder

__all__ = ["Autoencoder", "CausalLM", "Embedder", "ImageEmbedder", "TextToImage"]
__getattr__, __dir__ = extras.lazy_names(
    __name__,
    {
        "Autoencoder": "heliostat.recipes.images.autoencoder",
        "CausalLM": "heliostat.recipes.text.causal_lm",
        "Embedder": "heliostat.recipes.text.embedder",
        "ImageEmbedder": "heliostat.recipes.images.embedder",
        "TextToImage": "heliostat.recipes.images.text_to_image",
    },
)
