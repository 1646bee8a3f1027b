"""Tests image datasets on real Ray, real files, and a real S3 server: every source, bad images, duplicates, buckets, and
latents."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from heliostat.curation.prepare import prepare
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.recipes.images import rows as image_rows
from heliostat.storage.locations import Location
from PIL import Image

from tests import stores
from tests.integration.pipelines import write_pipeline
from tests.unit.build_images import image
from tests.unit.build_text_to_image import autoencoder, clip

pytestmark = pytest.mark.usefixtures("ray_session")

SIZES = [(40, 40), (80, 40), (40, 80), (60, 40)]


def make_input(folder: Path) -> None:
    """Writes sixty images in Parquet and tar: some of them twice, one as a smaller JPEG, and one of every kind of bad images."""
    folder.mkdir()
    good = [(image(*SIZES[i % 4], seed=i), f"image number {i}", "even" if i % 2 == 0 else "odd") for i in range(60)]
    small = io.BytesIO()
    Image.open(io.BytesIO(good[0][0])).resize((30, 30)).save(small, "JPEG", quality=80)
    extra = [(good[1][0], "again", ""), (small.getvalue(), "alike", ""), (b"bad", "no image", ""), (good[2][0][:-50], "cut", ""),
             (None, "nothing", ""), (image(40, 40, 99), "", ""), (image(4, 4, 98), "tiny", "")]  # fmt: skip
    rows = [{"image": i, "caption": c, "kind": k} for i, c, k in [*good[:40], *extra]]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=13)
    with tarfile.open(folder / "b.tar", "w") as tar:
        for number, (data, caption, kind) in enumerate(good[40:], 40):
            for suffix, body in (("png", data), ("json", json.dumps({"caption": caption, "kind": kind}).encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    (folder / "c.tar").write_bytes((folder / "b.tar").read_bytes()[:700])


def make_yaml(tmp_path: Path, **more: object) -> Path:
    keys = {"resolution": 32, "columns": {"label": "kind"}, "min_side": 8, "duplicates": "perceptual", "distance": 3,
            "buckets": {"step": 8, "max_aspect": 2.0}, "tokenizer": {"vocab_size": 300}, "chunk_images": 5,
            "shard_images": 10}  # fmt: skip
    return write_pipeline(tmp_path, "ImagePipeline", **keys | more)


DROPPED = {"corrupt": 1, "duplicate": 1, "near_duplicate": 1, "no_caption": 1, "no_image": 1, "too_small": 1, "undecodable": 2}


def test_every_source_with_buckets_duplicates_and_bad_images(tmp_path):
    """Each good image appears once, in the bucket of its shape. Bad ones are listed."""
    make_input(tmp_path / "in")
    yaml, output = make_yaml(tmp_path), tmp_path / "out"
    report = prepare(yaml, [])
    assert report["dropped"] == DROPPED and report["documents"] == 60
    parts = manifest.read(Location(str(output))).meta["parts"]
    assert sum(parts.values()) == 60 and {"32x32", "40x24", "24x40"} <= set(parts) and len(parts) >= 3
    captions = []
    for name in parts:
        part = manifest.read(Location(str(output / name)))
        assert part.meta["classes"] == ["even", "odd"] and f"{part.meta['size'][0]}x{part.meta['size'][1]}" == name
        assert (output / name / "tokenizer.json").exists()
        for path in sorted({*part.chunks["path"].to_pylist()}):
            table = pq.read_table(output / name / path)
            captions += table["caption"].to_pylist()
            assert image_rows.pixels(table).shape[1:] == (3, part.meta["size"][1], part.meta["size"][0])
    expected = {f"image number {i}" for i in range(60)}
    assert len(captions) == len(set(captions)) == 60 and len(expected & set(captions)) >= 58  # of two alike either may stay
    listed = pq.read_table(output / "quarantine.parquet").to_pylist()
    assert len(listed) == sum(DROPPED.values()) and {"a.parquet#43", "c.tar"} <= {row["id"] for row in listed}
    assert prepare(yaml, [])["up_to_date"]


def test_a_folder_on_s3_gives_the_digest_of_the_same_folder_on_disk(tmp_path, s3_server):
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"file_name": f"{i}.png", "caption": f"image {i}"}) for i in range(12)]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(lines))
    for i in range(12):
        (tmp_path / "in" / f"{i}.png").write_bytes(image(20, 20, i))
    query = stores.bucket(s3_server, "images")
    place = Location(f"s3://images/in?{query}")
    pafs.copy_files(str(tmp_path / "in"), place.path, destination_filesystem=place.fs)
    yaml = make_yaml(tmp_path, buckets=None, resolution=16)
    there = prepare(yaml, [f"input=s3://images/in?{query}", f"output=s3://images/out?{query}"])
    assert there["documents"] == 12 and there["digest"] == prepare(yaml, [])["digest"]


def test_latents_and_embeddings_are_what_the_frozen_models_give(tmp_path):
    """A pool of two actors computes them. They equal, in float16, the results of the models in this process."""
    make_input(tmp_path / "in")
    plain = prepare(make_yaml(tmp_path, buckets=None), [f"output={tmp_path / 'plain'}"])
    tokenizer_of = tmp_path / "plain"
    folders = {"autoencoder": str(autoencoder(tmp_path / "vae")), "text_encoder": str(clip(tmp_path / "clip", tokenizer_of))}
    yaml = make_yaml(tmp_path, buckets=None, tokenizer=None, latents={**folders, "length": 8, "workers": 2, "batch": 4})
    report = prepare(yaml, [])
    assert report["documents"] == plain["documents"]
    made = manifest.read(Location(str(tmp_path / "out")))
    assert (
        made.meta["content"] == "latents" and made.meta["text"] == [8, 16] and set(made.meta["models"]) == {"autoencoder", "text"}
    )
    images = {r["id"]: r for p in (tmp_path / "plain/shards").rglob("*.parquet") for r in pq.read_table(p).to_pylist()}
    latents = {r["id"]: r for p in (tmp_path / "out/shards").rglob("*.parquet") for r in pq.read_table(p).to_pylist()}
    assert set(images) == set(latents) and not any("image" in r for r in latents.values())
    from heliostat.recipes.images import config as diffusion_config
    from heliostat.recipes.images.pipeline import encode, tokenize

    vae = diffusion_config.frozen_autoencoder(folders["autoencoder"])
    encoder = diffusion_config.frozen_text_encoder(folders["text_encoder"])
    tokenizer = diffusion_config.frozen_tokenizer(folders["text_encoder"], 8)
    for id in list(images)[:6]:
        table = pa.Table.from_pylist([images[id]])
        with torch.no_grad():
            expected = vae.encode(image_rows.pixels(table)).latent_dist.parameters[0].numpy()
            tokens = tokenize(tokenizer, [images[id]["caption"]])
            text = encode(encoder, tokens.input_ids, tokens.attention_mask).tokens[0].numpy()
        got = np.frombuffer(latents[id]["latent"], np.float16).reshape(expected.shape)
        assert np.abs(got - expected).max() < 2e-3
        assert np.abs(np.frombuffer(latents[id]["embedding"], np.float16).reshape(8, 16) - text).max() < 2e-3
    assert (tmp_path / "out" / "empty_caption.bin").stat().st_size == 8 * 16 * 2
    with pytest.raises(ConfigError, match=r"^latents\.gpus: an actor needs 1 GPU, but the nodes have 0\."):
        prepare(yaml, [f"output={tmp_path / 'gpus'}", "latents.gpus=1"])
