"""Computes the features of a frozen image model once, before training, for `model.repa`. So training needs no image model.

The dataset stores the features of each image's patches (`recipes.images.stored_features`). Its manifest has the digest of the
image model, the type and shape of the features, and the error that the type adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from heliostat.errors import ConfigError
from heliostat.schema import Strict

if TYPE_CHECKING:
    import torch

    from heliostat.recipes.images.stored_features import FeatureError

FEATURES = "latents.features.encoder"


class StoredFeatures(Strict):
    """Configures the features of a frozen image model."""

    encoder: str
    """Frozen image model of `transformers` (DINOv2, ViT, CLIP, ResNet): a folder, or a name on the Hugging Face Hub."""
    dtype: Literal["float16", "int8"] = "float16"
    """Type of stored features. `int8` needs half of the space, with a scale per channel of each image."""

    def check(self) -> None:
        """Raises ConfigError if the folder isn't an image model, or doesn't describe its input."""
        from transformers import AutoConfig, AutoImageProcessor

        from heliostat.recipes.images import image_features
        from heliostat.recipes.pretrained import from_folder

        try:
            processor = from_folder(FEATURES, AutoImageProcessor, self.encoder)
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"{FEATURES}: {self.encoder!r} has no preprocessor_config.json that transformers can load. Use the folder of an "
                "image model, with this file"
            ) from e
        image_features.input_side(processor)
        config = from_folder(FEATURES, AutoConfig, self.encoder)
        if not hasattr(getattr(config, "vision_config", config), "num_channels"):
            raise ConfigError(f"{FEATURES}: a model of type {config.model_type!r} takes no images. Use an image model")

    def identity(self) -> dict[str, str]:
        """Returns the digest of the image model, and the type of the features."""
        from heliostat.recipes.images import config as diffusion_config

        return {"model": diffusion_config.folder_digest(self.encoder), "dtype": self.dtype}


class FeatureEncoder:
    """Computes and packs features in an actor."""

    def __init__(self, settings: StoredFeatures, device: str) -> None:
        from heliostat.recipes.images.image_features import PatchFeatures
        from heliostat.recipes.images.stored_features import FeatureFormat

        self.model = PatchFeatures(settings.encoder, device)
        identity = settings.identity()
        self.format = FeatureFormat(identity["model"], settings.dtype, self.model.grid, self.model.channels)

    def __call__(self, images: torch.Tensor) -> tuple[list[bytes], FeatureError]:
        """Packs the features of images in [-1, 1], [n, channels, height, width]. Also returns the error that packing adds."""
        from heliostat.recipes.images.stored_features import FeatureError

        features = self.model(images)
        rows, stored = self.format.arrays.pack(features)
        return rows, FeatureError.between(features, stored)


def combined(encoded: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """Returns the entry `features` of a record from the facts of all encoded batches: {} without features."""
    facts = [one for one in encoded if one]
    if not facts:
        return {}
    from heliostat.recipes.images.stored_features import FeatureError  # imports torch: 180 MB

    error = sum((FeatureError(**one["error"]) for one in facts), FeatureError())
    return {"features": {"format": facts[0]["format"], "error": vars(error)}}


def described(encoded: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """Returns the manifest's entry about features from the facts of all encoded batches: {} without features."""
    facts = combined(encoded).get("features")
    if not facts:
        return {}
    from heliostat.recipes.images.stored_features import FeatureError  # imports torch: 180 MB

    return {"features": {**facts["format"], **FeatureError(**facts["error"]).named()}}
