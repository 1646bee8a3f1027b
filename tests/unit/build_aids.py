"""Builds small backbones with several blocks, and recipes that train with token routing or alignment, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heliostat.data import manifest
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location

from tests.unit import build_images
from tests.unit.build_image_model import image_model
from tests.unit.build_images import PIXART, SD3, UNET, folder_of, image, prepared
from tests.unit.build_job import job

DEEP: dict[str, dict[str, Any]] = {"unet": UNET, "pixart": {**PIXART, "num_layers": 4}, "sd3": {**SD3, "num_layers": 4}}
FEATURES = 6  # channels of the stored features


def featured(folder: Path, dtype: str = "float16", count: int = 24) -> Path:
    """Prepares a dataset of pictures of 8 x 8 pixels, with features on a grid of 2 x 2."""
    encoder = image_model(folder / "encoder", side=8, patch=4, channels=FEATURES)
    folder_of(folder / "in", [(f"{i}.png", image(8, 8, seed=i), {"caption": f"number {i}"}) for i in range(count)])
    keys = {"name": "featured", "input": str(folder / "in"), "output": str(folder / "data"), "resolution": 8,
            "tokenizer": {"vocab_size": 300}, "latents": {"features": {"encoder": str(encoder), "dtype": dtype}}}  # fmt: skip
    prepared(keys)
    return folder / "data"


def recipe(dataset: Path, arch: str = "pixart", changes: dict[str, Any] | None = None, **model: Any) -> TextToImage:
    """Makes a bound recipe. `changes`: of keys of the job. `model`: further keys of `model:`."""
    made = TextToImage(job(**{**build_images.job(dataset, backbone=DEEP[arch], **model), **(changes or {})}))
    made.bind([manifest.read(Location(str(dataset)))])
    return made
