"""Tests adding shards: they make a new version of the manifest from their footers alone. The old version and its order don't
change."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.cli.main import app
from heliostat.data import index as indexing
from heliostat.data import manifest
from heliostat.data.dataset import Dataset, plan
from heliostat.data.index import index
from heliostat.data.manifest_table import LATER
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from typer.testing import CliRunner

from tests.unit.build_job import job

META = {"kind": "tokens", "name": "d", "tokenizer": "ab", "vocab_size": 500, "end_of_document": 0, "documents": 0,
        "dropped": {"empty": 1}, "duplicates": 2, "bytes": 9, "unigram_entropy": 3.5}  # fmt: skip
TOKENS = pa.list_(pa.int32())


def shard(folder: Path, name: str, seed: int, documents: int = 30, high: int = 500, **options: object) -> None:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, high, rng.integers(1, 40)).tolist() for _ in range(documents)]
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    options = {"row_group_size": 10, "write_page_checksum": True} | options
    pq.write_table(pa.table({"tokens": pa.array(texts, TOKENS)}), folder / "shards" / name, **options)


def footers(folder: Path) -> list[dict]:
    paths = sorted(f"shards/{p.name}" for p in (folder / "shards").iterdir())
    return [row for path in paths for row in manifest.read_footer(Location(str(folder)), path, "tokens")]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Prepares three shards of thirty documents."""
    for i in range(3):
        shard(tmp_path, f"{i:05d}.parquet", i)
    manifest.write(Location(str(tmp_path)), footers(tmp_path), {**META, "documents": 90})
    return tmp_path


def test_added_shards_make_a_new_version_that_equals_indexing_all_at_once(dataset):
    """Their row groups are listed as in their footers, in path order among the old ones, and counts cover the whole dataset."""
    place = Location(str(dataset))
    before = manifest.read(place)
    for name in ("00001-more.parquet", "10000.parquet"):
        shard(dataset, name, len(name))
    report = index(place)
    after = manifest.read(place)
    assert after.chunks.to_pylist() == [{**LATER, **row} for row in footers(dataset)]
    assert (report.previous, report.digest, report.shards_added) == (before.digest, after.digest, 2)
    assert report.digest != report.previous and report.dataset == str(place)
    assert (report.chunks, report.rows, report.tokens) == (15, 150, sum(r["tokens"] for r in footers(dataset)))
    expected = {k: v for k, v in META.items() if k not in ("bytes", "unigram_entropy")} | {"documents": 150}
    assert {k: v for k, v in after.meta.items() if k != "digest"} == expected


def test_one_at_a_time_or_all_at_once_is_the_same_version(dataset, tmp_path_factory):
    """The digest depends on the shards, not on the history of indexing."""
    place = Location(str(dataset))
    for i in range(3, 6):
        shard(dataset, f"{i:05d}.parquet", i)
        last = index(place).digest
    other = tmp_path_factory.mktemp("other")
    for i in range(3):
        shard(other, f"{i:05d}.parquet", i)
    manifest.write(Location(str(other)), footers(other), {**META, "documents": 90})
    for i in range(3, 6):
        shard(other, f"{i:05d}.parquet", i)
    assert index(Location(str(other))).digest == last


def test_nothing_new_changes_nothing(dataset):
    """The digest is the same, and no file is written. Files that aren't shards don't count."""
    (dataset / "shards" / "notes.txt").write_text("not a shard")
    (dataset / "shards" / "00009.parquet.1a2b3c4d.partial").write_bytes(b"being written")
    seen = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    report = index(Location(str(dataset)))
    assert report.shards_added == 0 and report.digest == report.previous == manifest.read(Location(str(dataset))).digest
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == seen


def test_a_run_keeps_its_version_and_its_samples(dataset):
    """After two additions of shards, the first version is read by its digest, with the same samples as before."""
    place = Location(str(dataset))
    first = manifest.read(place)
    run = job(**{"data.sources.0.path": str(place), "data.sequence_length": 16})
    data = Dataset(plan(run, [first]))
    samples = data.order.locate(np.arange(2 * int(data.order.epoch_samples[0])))
    content = data.read(samples)
    for i in (7, 8):
        shard(dataset, f"0000{i}.parquet", i)
        index(place)
    again = Dataset(plan(run, [first]))
    found = again.order.locate(np.arange(2 * int(data.order.epoch_samples[0])))
    for field in dataclasses.fields(samples):
        assert np.array_equal(getattr(found, field.name), getattr(samples, field.name)), field.name
    assert np.array_equal(again.read(found), content)
    newest = Dataset(plan(run, [manifest.read(place)]))
    assert newest.order.epoch_samples[0] > again.order.epoch_samples[0]


def test_a_dataset_from_before_versions_were_kept_keeps_its_version_too(dataset):
    """Without manifests/, the newest version is kept when a new one is written."""
    place = Location(str(dataset))
    place.join(manifest.VERSIONS).delete()
    before = manifest.read(place)
    shard(dataset, "00003.parquet", 3)
    index(place)
    assert manifest.read(place, before.digest).chunks.equals(before.chunks)
    assert manifest.read(place, before.digest).meta == before.meta


def test_only_new_footers_are_read(dataset):
    """Listed shards may have become unreadable. While their sizes are unchanged, indexing doesn't read them."""
    for path in (dataset / "shards").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    shard(dataset, "00003.parquet", 3)
    assert index(Location(str(dataset))).shards_added == 1


@pytest.mark.parametrize("change", ["longer", "gone"])
def test_a_listed_shard_that_changed_is_named(dataset, change):
    """Shards never change. If one is missing or has another size, DataError is raised, and no version is written."""
    place, victim = Location(str(dataset)), dataset / "shards" / "00001.parquet"
    size, digest = victim.stat().st_size, manifest.read(place).digest
    if change == "longer":
        victim.write_bytes(victim.read_bytes() + b"x")
    else:
        victim.unlink()
    shard(dataset, "00003.parquet", 3)
    with pytest.raises(DataError, match=rf"shards/00001\.parquet: expected {size:,} bytes, .*Restore the file"):
        index(place)
    assert manifest.read(place).digest == digest


BAD = {
    "another column": (pa.table({"text": ["a"]}), r"has no column 'tokens'"),
    "no lists": (pa.table({"tokens": pa.array([1, 2], pa.int32())}), "isn't a list of integers"),
    "lists of text": (pa.table({"tokens": [["a"]]}), "isn't a list of integers"),
    "lists of lists": (pa.table({"tokens": [[[1]]]}), "isn't a list of integers"),
    "a foreign vocabulary": (
        pa.table({"tokens": pa.array([[1, 500]], TOKENS)}),
        "tokens from 1 to 500, but .* vocabulary has 500",
    ),
    "negative ids": (pa.table({"tokens": pa.array([[-1, 7]], TOKENS)}), "tokens from -1 to 7"),
    "an empty document": (pa.table({"tokens": pa.array([[1], []], TOKENS)}), "1 empty documents or null tokens"),
    "nothing": (pa.table({"tokens": pa.array([], TOKENS)}), "has no row group"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_new_shard_that_does_not_belong_is_named(dataset, case):
    """The error has the shard and its fault, and the old version stays the newest."""
    table, message = BAD[case]
    digest = manifest.read(Location(str(dataset))).digest
    with pq.ParquetWriter(dataset / "shards" / "bad.parquet", table.schema) as writer:
        if table.num_rows:
            writer.write_table(table)
    shard(dataset, "good.parquet", 3)
    with pytest.raises(DataError, match=rf"shards/bad\.parquet: .*{message}"):
        index(Location(str(dataset)))
    assert manifest.read(Location(str(dataset))).digest == digest


def test_a_damaged_new_shard_is_named(dataset):
    """The shard is truncated, as by an interrupted upload, so it isn't a readable Parquet file."""
    shard(dataset, "00003.parquet", 3)
    file = dataset / "shards" / "00003.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"shards/00003\.parquet: isn't a readable Parquet file"):
        index(Location(str(dataset)))


def test_a_shard_without_statistics_is_taken_as_it_is(dataset):
    """The footer alone doesn't show its token ids; a later read does."""
    shard(dataset, "00003.parquet", 3, high=60_000, write_statistics=False)
    assert index(Location(str(dataset))).shards_added == 1


def test_two_thousand_shards_are_read_several_at_a_time(dataset, monkeypatch):
    """All shards are listed, and several footers are read at the same time."""
    shard(dataset, "first.parquet", 3, documents=2)
    raw = (dataset / "shards" / "first.parquet").read_bytes()
    for i in range(1, 2000):
        (dataset / "shards" / f"x{i:05d}.parquet").write_bytes(raw)
    inside, most, real = set(), [0], manifest.read_footer

    def counted(*args: object, **kwargs: object) -> list[dict]:
        inside.add(id(kwargs))
        most[0] = max(most[0], len(inside))
        try:
            return real(*args, **kwargs)
        finally:
            inside.discard(id(kwargs))

    monkeypatch.setattr(indexing.manifest, "read_footer", counted)
    report = index(Location(str(dataset)))
    assert report.shards_added == 2000 and report.rows == 90 + 4000 and most[0] > 1


def test_a_dataset_of_rows_is_indexed_too(tmp_path):
    """Kind "rows" has any columns, and no tokens."""
    place = Location(str(tmp_path))
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "shards" / "0.parquet")
    manifest.write(place, manifest.read_footer(place, "shards/0.parquet", None), {"kind": "rows"})
    pq.write_table(pa.table({"image": [b"3"]}), tmp_path / "shards" / "1.parquet")
    report = index(place)
    assert (report.rows, report.tokens, report.shards_added) == (3, 0, 1)


def test_the_command_says_what_it_did(dataset):
    """--json prints the report as one object. Without it, the command prints one line."""
    shard(dataset, "00003.parquet", 3)
    done = CliRunner().invoke(app, ["data", "index", str(dataset), "--json"])
    report = json.loads(done.stdout)
    assert set(report) == {"dataset", "digest", "previous", "shards_added", "chunks", "tokens", "rows", "seconds"}
    assert done.exit_code == 0 and report["shards_added"] == 1
    assert "0 shards added, nothing new" in CliRunner().invoke(app, ["data", "index", str(dataset)]).stdout
