"""Tests features of image models that datasets store: what they are, how they are packed, and the error that packing adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.recipes.images.image_features import PatchFeatures
from heliostat.recipes.images.stored_features import FeatureError, FeatureFormat, values
from heliostat.storage.locations import Location
from heliostat.tracking import card

from tests.unit.build_image_model import image_model
from tests.unit.build_images import folder_of, image, job, prepared
from tests.unit.build_job import job as made_job

pytestmark = pytest.mark.usefixtures("one_thread")


def dataset_of(place: Path, features: dict[str, Any] | None, **more: Any) -> manifest.Manifest:
    pictures = [(f"{i}.png", image(16, 12, seed=i), {"caption": f"picture {i}"}) for i in range(6)]
    folder_of(place / "in", pictures)
    latents = {"latents": {"features": features, "batch": 4}} if features else {}
    keys = {"name": "test", "input": str(place / "in"), "output": str(place / "out"), "resolution": 16, **latents, **more}
    return prepared(keys)[0]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "resnet"])
def test_features_are_the_patches_of_the_model_and_cover_images_of_any_shape(kind: str, tmp_path: Path) -> None:
    model = PatchFeatures(str(image_model(tmp_path, kind)))
    side = 4 if kind != "resnet" else 2
    assert model.grid == (side, side) and model.channels == 12
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    found = model(images)
    assert found.shape == (3, side, side, 12) and torch.isfinite(found).all()
    assert model(torch.rand(2, 1, 10, 22)).shape == (2, side, side, 12)
    hidden = model.model(pixel_values=((images + 1) / 2 - 0.5) / 0.25).last_hidden_state
    flat = hidden[:, 1:] if kind != "resnet" else hidden.flatten(2).mT  # one class token comes first
    assert torch.allclose(found.flatten(1, 2), flat, atol=1e-5)


def test_int8_keeps_each_channel_within_half_a_step_of_its_own_scale() -> None:
    """A channel that is a thousand times larger than another one doesn't make the other one coarse."""
    random = np.random.default_rng(0)
    exact = (random.standard_normal((4, 5, 8)) * np.geomspace(1e-2, 1e1, 8)).astype(np.float32)
    form = FeatureFormat("x", "int8", (4, 5), 8)
    (row, other), restored = form.arrays.pack(torch.from_numpy(np.stack([exact, -exact])))
    assert len(row) == form.arrays.row_bytes == 4 * 5 * 8 + 2 * 8
    step = np.abs(exact).max((0, 1)) / 127
    batch = form.batch([row, other])
    stored = values(batch)[0].numpy()
    assert batch["features"].dtype == torch.int8 and torch.equal(restored, values(batch))
    assert (np.abs(stored - exact) <= step * (0.5 + 127 * 2**-10)).all()  # half a step, and the rounding of the scale
    assert FeatureError.between(torch.from_numpy(exact), torch.from_numpy(stored)).named()["relative_error"] < 0.01
    half = FeatureFormat("x", "float16", (4, 5), 8)
    rows, _ = half.arrays.pack(torch.from_numpy(exact[None]))
    assert rows == [exact.astype(np.float16).tobytes()] and half.batch(rows)["features"].dtype == torch.float16
    assert np.array_equal(values(half.batch(rows))[0].numpy(), exact.astype(np.float16).astype(np.float32))
    assert torch.equal(values(batch)[1], -torch.from_numpy(stored))
    assert not values(form.batch(form.arrays.pack(torch.zeros(1, 4, 5, 8))[0])).any()


def test_errors_add_up_over_images_to_those_of_all_patches() -> None:
    random = np.random.default_rng(1)
    exact = random.standard_normal((6, 2, 2, 5))
    stored = exact + 0.1 * random.standard_normal(exact.shape)
    exact[0, 0, 0] = stored[0, 0, 0] = 0
    pairs = [(torch.from_numpy(exact[a:b]), torch.from_numpy(stored[a:b])) for a, b in ((0, 1), (1, 6))]
    summed = sum((FeatureError.between(*pair) for pair in pairs), FeatureError()).named()
    a, b = exact.reshape(-1, 5), stored.reshape(-1, 5)
    cosine = np.mean([0, *(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a[1:], b[1:], strict=True))])
    assert summed["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=5e-3)
    assert summed["cosine_error"] == pytest.approx(cosine, rel=5e-3)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_dataset_stores_the_features_of_its_own_images_and_states_their_error(dtype: str, tmp_path: Path) -> None:
    folder = image_model(tmp_path / "model")
    made = dataset_of(tmp_path, {"encoder": str(folder), "dtype": dtype})
    meta = made.meta["features"]
    form = FeatureFormat.of(meta)
    assert form and form.dtype == dtype and form.grid == (4, 4) and made.meta["content"] == "images"
    table = pq.read_table(tmp_path / "out" / next(iter(set(made.paths))))
    from heliostat.recipes.images.rows import pixels

    exact = PatchFeatures(str(folder))(pixels(table))
    error = FeatureError.between(exact, form.arrays.unpack(table["features"].to_pylist())).named()
    assert meta["relative_error"] == pytest.approx(error["relative_error"], rel=0.05) and 0 < error["relative_error"] < 0.01
    assert meta["cosine_error"] == pytest.approx(error["cosine_error"], rel=0.05, abs=1e-9)
    text = card.text(made_job(**job(tmp_path / "out", repa={"layer": 1})), "id", 1, {}, [made], [])
    assert f"stored as {dtype}, with a relative error of {meta['relative_error']:.2%}" in text


def test_another_encoder_or_type_is_another_dataset_and_no_features_is_the_dataset_of_before(tmp_path: Path) -> None:
    plain = dataset_of(tmp_path / "a", None)
    again = dataset_of(tmp_path / "b", {"encoder": str(image_model(tmp_path / "one"))})
    other = dataset_of(tmp_path / "c", {"encoder": str(image_model(tmp_path / "two", "dinov2"))})
    eight = dataset_of(tmp_path / "d", {"encoder": str(tmp_path / "one"), "dtype": "int8"})
    assert len({m.digest for m in (plain, again, other, eight)}) == 4
    assert again.meta["features"]["model"] == eight.meta["features"]["model"] != other.meta["features"]["model"]
    assert "features" not in plain.meta


def test_wrong_encoders_are_rejected_before_anything_is_computed(tmp_path: Path, digits: Path) -> None:
    from tests.unit.build_text_to_image import clip

    with pytest.raises(ConfigError, match=r"^latents\.features\.encoder: .*isn't a model folder"):
        dataset_of(tmp_path / "a", {"encoder": str(tmp_path / "none")})
    text = clip(tmp_path / "text", digits)
    with pytest.raises(ConfigError, match=r"^latents\.features\.encoder: .* no preprocessor_config\.json"):
        dataset_of(tmp_path / "b", {"encoder": str(text)})
    (text / "preprocessor_config.json").write_text((image_model(tmp_path / "v") / "preprocessor_config.json").read_text())
    with pytest.raises(ConfigError, match=r"^latents\.features\.encoder: a model of type 'clip_text_model' takes no images"):
        dataset_of(tmp_path / "c", {"encoder": str(text)})
    assert not Location(str(tmp_path / "a/out")).join("manifest.json").exists()
