"""Lists the modules that training workers import, so that a fork server can import them ahead.

A name may be of nothing that there is: what cannot be imported ahead is left to whoever needs it. Imports nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from heliostat.config import workspace

TRAINING = ("ray.data", "heliostat.training.worker.preload")
TRIALS = (  # what a sweep's trials import beside that: each is a run's driver
    "heliostat.tune.trial",
    "heliostat.training.run",
    "heliostat.training.driver.attempt",
    "heliostat.training.driver.progress",
    "heliostat.tracking.logger",
    "mlflow",
)
TEXT = (
    "heliostat.recipes.text.causal_lm",
    "transformers.modeling_utils",
    "transformers.models.{arch}.modeling_{arch}",
    "transformers.integrations.deepspeed",
)
DIFFUSERS = ("diffusers.models.unets", "diffusers.models.transformers", "diffusers.models.autoencoders")
OF = {  # the recipes of heliostat
    "CausalLM": TEXT,
    "Embedder": ("heliostat.recipes.text.embedder", "heliostat.recipes.text.encoder", *TEXT[1:]),
    "ImageEmbedder": ("heliostat.recipes.images.embedder", *TEXT[1:]),
    "TextToImage": ("heliostat.recipes.images.text_to_image", *DIFFUSERS),
    "Autoencoder": ("heliostat.recipes.images.autoencoder", *DIFFUSERS),
}


def modules(recipe: str, model: Mapping[str, object]) -> list[str]:
    """Returns the modules for a job's `recipe` and `model`; not those of a user's own recipe, whose import may do anything."""
    module, _, name = recipe.partition(":")
    if workspace.BUILT_IN.get(module, module) != "heliostat.recipes":
        return [*TRAINING]
    return [*TRAINING, *(one.format(arch=model.get("arch", "auto")) for one in OF.get(name, ()))]
