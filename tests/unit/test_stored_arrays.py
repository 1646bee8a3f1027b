"""Tests how datasets store latents and text embeddings: as float16 or int8, with the error that storing adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from heliostat.curation import prepare_report
from heliostat.curation.images import stream
from heliostat.curation.images.encoding import stated
from heliostat.curation.images.latents import Latents
from heliostat.data import manifest
from heliostat.data.manifest_table import ERRORS, digest
from heliostat.errors import ConfigError
from heliostat.recipes.images import config, frozen_autoencoders, rows
from heliostat.recipes.images.stored_arrays import AREA, WIDTH, ArrayFormat, StoredError, summed
from heliostat.tracking import card

from tests.unit import build_images
from tests.unit.build_images import SD3, folder_of, image, prepared
from tests.unit.build_job import job
from tests.unit.build_text_encoders import texts
from tests.unit.build_text_to_image import autoencoder, recipe

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ["clip+", "clip+", "t5"]


@pytest.mark.parametrize(("shape", "shared"), [((5, 16), WIDTH), ((16,), WIDTH), ((1, 3), WIDTH), ((8, 3, 5), AREA)])
def test_int8_keeps_each_embedding_and_channel_within_half_a_step_of_its_own_scale(
    shape: tuple[int, ...], shared: tuple[int, ...]
) -> None:
    """An embedding, or a channel of latents, that is a thousand times larger than another one doesn't make the other one coarse.
    Zeros stay zeros, so they still mark padding."""
    random = np.random.default_rng(0)
    sizes = np.geomspace(1e-2, 1e1, 8 * shape[0]).reshape(8, shape[0], *[1] * (len(shape) - 1))
    exact = (random.standard_normal((8, *shape)) * (sizes if shared == AREA else sizes[:, :1])).astype(np.float32)
    exact[3] = 0
    form = ArrayFormat(shape, "int8", shared)
    rows, restored = form.pack(torch.from_numpy(exact))
    scales = np.prod(shape[: -len(shared)])
    assert {len(row) for row in rows} == {form.row_bytes} and form.row_bytes == np.prod(shape) + 2 * scales
    stored = form.unpack(rows).numpy()
    assert np.array_equal(restored.numpy(), stored)
    step = np.abs(exact).max(shared, keepdims=True) / 127
    assert (np.abs(stored - exact) <= step * (0.5 + 127 * 2**-10)).all()  # half a step, and the rounding of the scale
    assert np.array_equal(stored.any(shared), exact.any(shared))
    half = ArrayFormat(shape, shared=shared)
    rows, restored = half.pack(torch.from_numpy(exact))
    assert rows == [row.tobytes() for row in exact.astype(np.float16)]
    assert np.array_equal(half.unpack(rows).numpy(), restored.numpy())


def test_errors_of_batches_add_up_to_the_error_of_all_rows() -> None:
    random = np.random.default_rng(1)
    exact = torch.from_numpy(random.standard_normal((7, 400)).astype(np.float32))
    stored = exact.half().float()
    parts = [{"latent": StoredError.between("float16", exact[a:b], stored[a:b])} for a, b in ((0, 3), (3, 7))]
    wanted = float((exact - stored).double().norm() / exact.double().norm())
    assert summed(parts)["latent"].named()["relative_error"] == pytest.approx(wanted, rel=5e-3)
    assert StoredError("int8").named()["relative_error"] == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[str, Any]:
    """Makes the same dataset of latents and of the embeddings of three text encoders, in both types."""
    place = tmp_path_factory.mktemp("stored")
    kinds = texts(KINDS, place, digits, [8, 8, 12], [16, 16, 48])
    captions = ("one", "the digit three", "a handwritten seven", "eight")
    folder_of(place / "in", [(f"{i}.png", image(8, 8, seed=i), {"caption": said}) for i, said in enumerate(captions)])
    keys = {"name": "test", "input": str(place / "in"), "resolution": 8}
    out: dict[str, Any] = {"place": place, "texts": kinds}
    vae = str(autoencoder(place / "vae"))
    kept = {"clip+": "penultimate", "t5": "last"}
    for dtype in ("float16", "int8"):
        encoders = [
            {"text_encoder": one["pretrained"], "length": one["length"], "padding": "seen", "layer": kept[kind], "dtype": dtype}
            for one, kind in zip(kinds, KINDS, strict=True)
        ]
        latents = {"autoencoder": vae, "latent_dtype": dtype, "text_encoders": encoders, "batch": 3}
        out[dtype], _ = prepared({**keys, "latents": latents, "output": str(place / dtype)})
    default = {"autoencoder": vae, "text_encoders": [{k: v for k, v in one.items() if k != "dtype"} for one in encoders]}
    out["default"], _ = prepared({**keys, "latents": {**default, "batch": 3}, "output": str(place / "default")})
    return out


def table(made: dict[str, Any], dtype: str) -> Any:
    return pq.read_table(made["place"] / dtype / made[dtype].paths[0])


def test_int8_trains_with_the_latents_and_embeddings_of_float16_within_the_stated_error(made: dict[str, Any]) -> None:
    batches = {}
    for dtype in ("float16", "int8"):
        one = recipe(made["place"] / dtype, backbone={**SD3, "in_channels": 4, "out_channels": 4}, text=made["texts"],
                     autoencoder={"pretrained": str(made["place"] / "vae")}, objective={"prediction": "flow"})  # fmt: skip
        batches[dtype] = one.complete(one.batch(table(made, dtype), np.arange(4)))
    for name, exact in batches["float16"].items():
        error = float((batches["int8"][name].float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-9))
        assert (1e-3 < error < 2e-2) if name in ("image", "caption", "pooled") else error == 0, name
    for name in sorted({"latent", *made["int8"].meta[ERRORS]} - {"latent_log_variance"}):
        sizes = [len(table(made, dtype)[name][0].as_py()) for dtype in ("float16", "int8")]
        assert sizes[0] / 2 < sizes[1] <= 0.625 * sizes[0], name  # a scale per 8 numbers or more


def test_the_stated_errors_of_latents_are_those_of_their_means_and_of_their_log_variances(made: dict[str, Any]) -> None:
    """Log variances are the larger numbers, so an error of both together would hide the error of the means. The exact latents
    are the autoencoder's, in the order of the shard's rows."""
    stored = table(made, "int8")
    exact = frozen_autoencoders.encode(config.frozen_autoencoder(str(made["place"] / "vae")), rows.pixels(pictures(made, stored)))
    restored = ArrayFormat(exact.shape[1:], "int8", AREA).unpack(stored["latent"].to_pylist())
    for name, of_exact, of_stored in zip(("latent", "latent_log_variance"), exact.chunk(2, 1), restored.chunk(2, 1), strict=True):
        wanted = float((of_exact - of_stored).norm() / of_exact.norm())
        assert made["int8"].meta[ERRORS][name]["relative_error"] == pytest.approx(wanted, rel=5e-3), name


def pictures(made: dict[str, Any], stored: Any) -> Any:
    """Reads the images of a shard's rows from the input."""
    return pa.table({"image": [(made["place"] / "in" / id.split("#")[0]).read_bytes() for id in stored["id"].to_pylist()]})


def test_datasets_with_latents_of_different_types_are_one_error(made: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.sources: the datasets contain latents of different types\. Prepare all"):
        rows.facts([replace(made["float16"], meta={**made["float16"].meta, "latent_dtype": "int8"}), made["float16"]], False)


def test_a_type_of_latents_without_an_autoencoder_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"^latents\.latent_dtype: needs an autoencoder\. Set latents\.autoencoder, or remove"):
        Latents(text_encoder="clip", latent_dtype="int8").check(((8, 8),), 3)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_dataset_states_the_error_of_each_column_outside_of_its_digest(made: dict[str, Any], dtype: str) -> None:
    """So datasets that earlier versions of heliostat made keep their digests."""
    one, stored = made[dtype], {column for part in made[dtype].meta["texts"] for column in columns_of(part)}
    errors = one.meta[ERRORS]
    assert set(errors) == {"latent", "latent_log_variance", *stored} and len(stored) == 5
    for name, error in errors.items():
        low, high = (1e-3, 2e-2) if dtype == "int8" else (5e-5, 5e-4)
        assert low < error["relative_error"] < high and error["dtype"] == dtype, name
    assert digest(one.chunks, {k: v for k, v in one.meta.items() if k != ERRORS}) == one.digest
    assert manifest.read(one.location).meta[ERRORS] == errors
    report = {"up_to_date": False, "seconds": 1.0, "conversations": None, "documents": 4, "tokens": 0, "duplicates": 0,
              "dropped": {}, "listed": None, "dataset": "x", "chunks": 1, "digest": one.digest, "recorded_every": 1, "hub": {},
              "written_by": None, "rearranged": None, "stored": errors}  # fmt: skip
    said = f"stored as {dtype}, with a relative error of {errors['latent']['relative_error']:.2%}"
    assert f"latent: {said}" in prepare_report.explain(report)
    assert f"`latent` {said}" in card.text(job(**build_images.job(made["place"] / dtype)), "id", 1, {}, [one], [])


def columns_of(part: dict[str, Any]) -> list[str]:
    return [f"embedding-{part['digest'][:12]}", *([f"pooled-{part['digest'][:12]}"] if part["pooled"] else [])]


def test_float16_is_the_dataset_without_the_key_and_int8_is_another_one(made: dict[str, Any]) -> None:
    assert made["float16"].digest == made["default"].digest != made["int8"].digest
    assert all("dtype" not in one for one in made["default"].meta["texts"])
    assert {one["dtype"] for one in made["int8"].meta["texts"]} == {"int8"} == {made["int8"].meta["latent_dtype"]}
    assert "latent_dtype" not in made["default"].meta


def test_records_of_earlier_versions_give_their_images_without_an_error() -> None:
    """Work folders have records without errors. The error of the other images isn't that of the dataset."""
    errors = {"latent": vars(StoredError("float16", 4.0, 1e-6))}
    old, new = {"dealt": ["a", 1, 10], "files": []}, {"dealt": ["b", 1, 10], "files": [], ERRORS: errors}
    streamed = {"records": [{"runs": []}, {ERRORS: errors}, {"dealt": ["c", 1, 10]}], "runs": [], "files": []}
    each = [stream.dealt(record) for record in (new, streamed)]
    assert [len(one.runs) for one in each] == [1, 1]
    assert stated([error for one in each for error in one.errors]) == {
        ERRORS: {"latent": {"dtype": "float16", "relative_error": 0.0005}}
    }
    assert stream.dealt(old).runs and stated([*stream.dealt(old).errors, *each[0].errors]) == {}
    joint = {**old, "errors": {"latent": vars(StoredError("float16", 400.0, 1e-4))}}  # of means and log variances together
    assert stream.dealt(joint).runs and stated([*stream.dealt(joint).errors, *each[0].errors]) == {}
