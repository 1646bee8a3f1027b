"""Tests training at a growing resolution: `data.mix_schedule` over datasets of several sizes, with a shift that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.errors import ConfigError
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location

from tests.unit import build_aids, build_images
from tests.unit.build_images import folder_of, image, prepared
from tests.unit.build_job import job

pytestmark = pytest.mark.usefixtures("one_thread")
GROWS_AFTER, STEPS = 3, 6


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Prepares the same pictures at two resolutions."""
    folder = tmp_path_factory.mktemp("sizes")
    folder_of(folder / "in", [(f"{i}.png", image(16, 16, seed=i), {"caption": f"number {i}"}) for i in range(40)])
    for side in (8, 16):
        keys = {"name": f"at-{side}", "input": str(folder / "in"), "output": str(folder / str(side)), "resolution": side}
        prepared({**keys, "tokenizer": {"vocab_size": 300}})
    return {side: folder / str(side) for side in (8, 16)}


def growing(sizes: dict[int, Path], **changes: Any) -> Any:
    """Makes a job that trains on small images first. The large images come first in `sources`, so they set the model's size."""
    sources = [{"path": str(sizes[16]), "weight": 0}, {"path": str(sizes[8])}]
    usual = {"data.sources": sources, "data.one_source_batches": True, "train.global_batch_size": 8, "train.micro_batch_size": 2,
             "data.mix_schedule": [{"step": GROWS_AFTER, "weights": [1, 0]}]}  # fmt: skip
    objective = {"prediction": "flow", "shift": "auto", "base_size": 8}
    model = build_images.job(sizes[16], backbone=build_aids.DEEP["pixart"], objective=objective)
    return job(**{**model, **usual, **changes})


def test_every_batch_up_to_the_step_is_small_and_every_later_one_large_with_its_own_shift(sizes: dict[int, Path]) -> None:
    """The sizes follow from the step alone, and the shift from each batch's size, also when the run ends elsewhere."""
    one = growing(sizes)
    sources = [manifest.read(location) for location in one.sources]
    recipe = TextToImage(one)
    recipe.bind(sources)
    data = open_dataset(plan(one, sources))
    torch.manual_seed(0)
    model = recipe.build()
    for step in range(STEPS):
        places = data.order.step(step).ravel().reshape(-1, 2)
        for number, micro in enumerate(places):
            keys = step * 8 + number * 2 + np.arange(2)
            batch = recipe.complete(recipe.batch(data.read(data.order.locate(micro)), keys))
            side = 8 if step < GROWS_AFTER else 16
            assert batch["image"].shape[2:] == (side, side), step
            u, shift = batch["time"].double().numpy(), side / 8
            times = recipe.process.times(batch["time"], batch["image"].shape[2:])
            assert times.numpy() == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=1e-6)
        assert torch.isfinite(recipe.loss(model, batch).sum)
    assert recipe.parts.shape() == (3, 16, 16), "the first source sets the size of the model and of generated images"


def test_sizes_in_one_batch_are_one_error(sizes: dict[int, Path]) -> None:
    one = growing(sizes, **{"data.one_source_batches": False})
    recipe = TextToImage(one)
    with pytest.raises(ConfigError, match=r"^data\.one_source_batches: required, because .* different sizes"):
        recipe.bind([manifest.read(Location(str(sizes[side]))) for side in (16, 8)])
