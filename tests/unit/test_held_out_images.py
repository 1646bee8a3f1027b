"""Tests that image datasets hold out by image: at exact fractions, an image is on the same side in every dataset."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from heliostat.curation.images import pictures, tasks
from heliostat.data import manifest
from heliostat.data.manifest import PLACES, PLACES_KEY, Manifest
from heliostat.data.split import split

from tests.unit.build_images import folder_of, image, prepared

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
COUNT = 240


def dataset(place: Path, first: int = 0, caption: str = "picture", **keys: Any) -> list[Manifest]:
    """Prepares images of two shapes, and returns the datasets: one, or one per bucket."""
    rows = [(f"{i}.png", image(*[(12, 8), (8, 12)][i % 2], seed=i), {"caption": f"{caption} {i}"}) for i in range(first, COUNT)]
    folder_of(place / "in", rows)
    usual = {"name": "test", "input": str(place / "in"), "output": str(place / "out"), "resolution": 8}
    made, _ = prepared({**usual, **keys})
    return [manifest.read(made.location.join(part)) for part in made.meta["parts"]] if keys.get("buckets") else [made]


def sides(sources: list[Manifest], fraction: float) -> tuple[set[str], set[str]]:
    """Returns the ids of the held-out images, and of all images."""
    held, every = set[str](), set[str]()
    for source in sources:
        divided = split(source, None, fraction)
        for number, chunk in enumerate(source.chunks.select(["path", "row_group"]).to_pylist()):
            file = pq.ParquetFile(Path(source.location.path) / chunk["path"])
            ids = file.read_row_group(chunk["row_group"])["id"].to_pylist()
            out = divided.held_rows(np.full(divided.held[number], number), np.arange(divided.held[number]))
            held |= {ids[row] for row in out}
            every |= set(ids)
    return held, every


def test_an_image_is_on_the_same_side_in_every_dataset(tmp_path: Path) -> None:
    """So a run can train on one dataset and be scored on another, or mix both. The datasets differ in captions, sizes, shards,
    row groups, buckets, encoding, and in which other images they have."""
    first = dataset(tmp_path / "a", chunk_images=16, shard_images=64)
    others = [
        dataset(tmp_path / "b", caption="other", resolution=4, chunk_images=100, encoding="jpeg"),
        dataset(tmp_path / "c", first=60, buckets={"step": 4, "max_aspect": 2.0}, shard_images=50),
    ]
    before = set[str]()
    for fraction in FRACTIONS:
        held, every = sides(first, fraction)
        for other in others:
            also, known = sides(other, fraction)
            assert also == held & known and known <= every, fraction
        assert before <= held, fraction
        before = held
    assert abs(len(before) - COUNT / 2) < 4 * (COUNT / 4) ** 0.5


def test_exactly_the_images_below_the_fraction_are_held_out(tmp_path: Path) -> None:
    """The hash of the pixels is independent of the shard and of the id. Equal images are on the same side."""
    rows = [(f"{i}.png", image(8, 8, seed=i % 80), {"caption": f"picture {i}"}) for i in range(160)]
    folder_of(tmp_path / "in", rows)
    keys = {"name": "test", "input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "resolution": 8}
    made, _ = prepared({**keys, "duplicates": "keep", "chunk_images": 1, "shard_images": 40})
    places = {name: manifest.place(pictures.pixel_hash(pictures.decode(data, 3))) for name, data, _ in rows}
    for fraction in FRACTIONS:
        held, every = sides([made], fraction)
        assert held == {id for id in every if places[id] < fraction * PLACES} and len(every) == 160


def test_a_shard_without_an_image_holds_out_the_same_other_images(tmp_path: Path) -> None:
    """`data forget` moves no image between training and held-out. A shard of an earlier version has no positions, and gets
    none."""
    (made,) = dataset(tmp_path, chunk_images=16)
    file = pq.ParquetFile(tmp_path / "out" / made.paths[0])
    wanted = dict(zip(file.read()["id"].to_pylist(), np.repeat(made.places, made.chunks["rows"].to_numpy()), strict=True))
    groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
    alone = next(table for table in groups if len(table) == 1)["id"][0].as_py()
    for gone in (alone, groups[0]["id"][0].as_py()):
        data, _ = tasks.without(file, gone)
        assert data is not None
        (tmp_path / "out/shards/x.parquet").write_bytes(data)
        rows = manifest.read_footer(made.location, "shards/x.parquet", None)
        ids = pq.read_table(io.BytesIO(data))["id"].to_pylist()
        left = dict(zip(ids, np.repeat([row["place"] for row in rows], [row["rows"] for row in rows]), strict=True))
        assert left == {id: place for id, place in wanted.items() if id != gone}
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, file.schema_arrow) as old:
        for table in groups:
            old.write_table(table)
    data, _ = tasks.without(pq.ParquetFile(sink), alone)
    assert data is not None and PLACES_KEY not in (pq.read_metadata(io.BytesIO(data)).metadata or {})


@pytest.mark.parametrize("version", [1, 2])
def test_a_dataset_without_positions_keeps_its_held_out_images(tmp_path: Path, version: int) -> None:
    """Datasets of earlier versions have no positions: they hold out consecutive rows, which follow from the shard's digest."""
    (made,) = dataset(tmp_path, chunk_images=16)
    chunks = made.chunks.set_column(made.chunks.schema.get_field_index("place"), "place", [np.full(len(made.chunks), -1)])
    divided = split(Manifest(made.location, chunks, made.meta), None, 0.2, version)
    assert 0 < divided.held.sum() < made.rows / 2 and divided.start.any()
    assert (divided.held < divided.samples).sum() > len(chunks) / 2  # row groups aren't held out completely
