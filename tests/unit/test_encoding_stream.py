"""Tests the stream that encodes images if actors have GPUs: it makes the dataset of the recorded tasks."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from heliostat.curation import streamed, streaming
from heliostat.curation.images import stream, tasks
from heliostat.curation.images.encoding import Encoding
from heliostat.curation.images.latents import Latents
from heliostat.curation.images.making import ImageMaking
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.segment import SpilledRun
from heliostat.curation.table_stream import ReadTables
from heliostat.data.manifest_table import ERRORS
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow

from tests.unit.build_image_model import image_model
from tests.unit.build_images import folder_of, image, prepared
from tests.unit.build_text_to_image import autoencoder, clip
from tests.unit.test_stream_failures import FailingStream

pytestmark = pytest.mark.usefixtures("one_thread")
FILES, EACH = 8, 5
AS_ON_GPUS = ImageMaking.encoding


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Writes images of two shapes with two captions, and the encoders: latents, embeddings, and features."""
    place = tmp_path_factory.mktemp("given")
    for number in range(FILES):
        pictures = [
            (f"{i}.png", image(*[(40, 20), (20, 40)][i % 2], seed=EACH * number + i),
             {"caption": f"digit {i} of {number}", "long": "a long caption" if i else ""})
            for i in range(EACH)
        ]  # fmt: skip
        folder_of(place / f"in/{number:02}", pictures)
    return {"name": "test", "input": str(place / "in"), "resolution": 32, "buckets": {"step": 8, "max_aspect": 2.0},
            "columns": {"others": ["long"], "captions": ["long"]}}  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("models")
    models: dict[str, Any] = {
        "autoencoder": str(autoencoder(place / "vae")),
        "text_encoder": str(clip(place / "clip", digits)),
        "length": 8,
    }
    models["latent_dtype"] = "int8"
    return {**models, "features": {"encoder": str(image_model(place / "vit")), "dtype": "int8"}, "batch": 2}


def on_cpu(self: ImageMaking, latents: Latents) -> Encoding:
    """Describes tasks that compute on this machine's CPU although actors have GPUs."""
    return AS_ON_GPUS(self, latents.model_copy(update={"gpus": 0.0}))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.ci)])
def test_a_stream_that_loses_blocks_gives_the_dataset_of_recorded_tasks(
    keys: dict[str, Any], latents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Latents, embeddings of two captions, features, and their error are the same, bit for bit, with blocks that end in any
    order. Recorded tasks encode the images of the tasks that the stream doesn't finish. A second run encodes nothing again."""
    plain, _ = prepared({**keys, "latents": latents, "output": str(tmp_path / "plain")})
    monkeypatch.setattr(streaming, "RunningStream", FailingStream)
    monkeypatch.setattr(FailingStream, "rng", random.Random(seed))
    monkeypatch.setattr(FailingStream, "ends_after", (4, 99)[seed])
    monkeypatch.setattr(stream, "BLOCK_BYTES", (1, 10_000)[seed])
    monkeypatch.setattr(Flow, "devices", lambda flow, each=1.0: 1)
    monkeypatch.setattr(ImageMaking, "encoding", on_cpu)
    monkeypatch.setattr(ImagePipeline, "finish", lambda *_: None)  # keeps the work folder
    on_gpus = {**keys, "latents": {**latents, "gpus": 1.0}, "output": str(tmp_path / "streamed")}
    first, flow = prepared(on_gpus)
    made = len(list((tmp_path / "streamed.work/done/stream").iterdir()))
    assert first.digest == plain.digest and first.meta["features"] == plain.meta["features"]
    for column, error in plain.meta[ERRORS].items():
        assert first.meta[ERRORS][column]["relative_error"] == pytest.approx(error["relative_error"], rel=0.02)
    assert 0 < made < flow.done["read"] and flow.done["deal"] > flow.done["read"]
    again, flow = prepared(on_gpus)
    assert again.digest == plain.digest and "deal" not in flow.done


def test_reading_for_a_stream_needs_no_torch() -> None:
    """Loading it takes seconds, and hundreds of MB in each process of a CPU."""
    code = "import sys; from heliostat.curation.images import stream; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_blocks_of_small_images_are_bounded_because_their_embeddings_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5-XXL makes 1 to 2 MiB of a caption. By bytes alone, a block of images that aren't decoded would become gigabytes. The
    blocks contain each image once, and only the last block is marked as the last one."""
    count, batch, run = 2000, 48, SpilledRun("x", 2000, 0)
    images = pa.table({"id": range(count), "width": [8, 16] * (count // 2), "height": [8] * count, "image": [b"x"] * count})
    monkeypatch.setattr(tasks, "dealt", lambda *_: images)
    encoding = stream.EncodingStream(1, 1.0, Encoding(Latents(text_encoder="t5", batch=batch), ()), {})
    read = ReadTables(encoding, Location("here"))
    blocks = [one for sent in read(pa.table({"id": [streamed.sent(7, run)]})) for one in sent.to_pylist()]
    held = [[id for part in streamed.unpacked(one["tables"]) for id in part["id"].to_pylist()] for one in blocks]
    assert sorted(id for ids in held for id in ids) == list(range(count)) and len(held) > 1
    assert max(map(len, held)) < stream.BLOCK_IMAGES + batch
    assert [one["last"] for one in blocks] == [False] * (len(held) - 1) + [True]
    assert [one["block"] for one in blocks] == list(range(len(held))) and {one["task"] for one in blocks} == {7}
