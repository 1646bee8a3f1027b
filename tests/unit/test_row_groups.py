"""Tests the records of shards and their collection: the same manifest as from rows, byte for byte, in little memory."""

import gc
import hashlib
import io
import json
import random
import resource
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from heliostat.data import collection, manifest, manifest_table, row_groups, stored_rows
from heliostat.data.manifest_table import LATER, SCHEMA
from heliostat.data.row_groups import ShardCollector
from heliostat.data.stored_rows import StoredRows
from heliostat.errors import DataError, StorageError
from heliostat.storage.locations import Location

from tests.unit.build_making import STAGES, make, make_input

META = {"kind": "tokens", "vocab_size": 100, "name": "ü"}


def shard_rows(rng: random.Random, shard: int, groups: int) -> list[dict[str, Any]]:
    """Returns the manifest's rows of a shard. Two shards have the same footer."""
    path = f"shards/{shard:05d}/{rng.getrandbits(64):016x}.parquet"
    return [
        {"path": path, "row_group": group, "rows": rng.randrange(1, 99), "tokens": rng.randrange(10**6),
         "bytes": rng.randrange(10**6), "file_bytes": 10**9 + shard, "footer": f"{shard // 2:032x}",
         "place": rng.randrange(manifest.PLACES), "content": f"{rng.getrandbits(128):032x}"}
        for group in range(groups)
    ]  # fmt: skip


def earlier_file(rows: list[dict[str, Any]], rows_each: int) -> bytes:
    """Writes a manifest as the versions did that kept its rows as dicts."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    columns = {name: table[name].fill_null(LATER[name]) if name in LATER else table[name] for name in SCHEMA.names}
    table = pa.table(columns, schema=SCHEMA).sort_by([("path", "ascending"), ("row_group", "ascending")])
    digest = hashlib.sha256(json.dumps(META, sort_keys=True).encode())
    for column in SCHEMA:
        values = table[column.name]
        if column.name in LATER and pc.all(pc.equal(values, LATER[column.name])).as_py():
            continue
        strings = column.type == pa.string()
        digest.update("\n".join(values.to_pylist()).encode() if strings else values.to_numpy().astype("<i8").tobytes())
    sink, meta = io.BytesIO(), {**META, "digest": digest.hexdigest()}
    table = table.replace_schema_metadata({"heliostat": json.dumps(meta)})
    pq.write_table(table, sink, compression="zstd", row_group_size=rows_each)
    return sink.getvalue()


def collected(shards: list[list[dict[str, Any]]], rng: random.Random) -> StoredRows:
    """Collects shards in any order. Some have the record of an earlier version."""
    collector = ShardCollector()
    for rows in rng.sample(shards, len(shards)):
        old = {"path": rows[0]["path"], "file_bytes": rows[0]["file_bytes"], "chunks": rows}
        record = old if rng.random() < 0.3 else row_groups.listed(rows)
        collector.add(json.loads(json.dumps(record)))
    return collector.rows()


@pytest.mark.parametrize("seed", range(12))
def test_a_manifest_has_the_bytes_that_earlier_versions_wrote(tmp_path, monkeypatch, seed):
    """From rows, from a table, and from records of shards, in any order, however many rows are processed together."""
    rng = random.Random(seed)
    shards = [shard_rows(rng, shard, rng.randrange(1, 10)) for shard in range(rng.randrange(1, 40))]
    rows = [row for one in shards for row in one]
    if seed % 3 == 0:
        rows = [{name: value for name, value in row.items() if name not in LATER} for row in rows]
        shards = [[{name: value for name, value in row.items() if name not in LATER} for row in one] for one in shards]
    rows_each, many = rng.choice([1, 7, 50, 1 << 20]), rng.choice([1, 5, 1 << 16])
    monkeypatch.setattr(manifest_table, "PARQUET_ROWS", rows_each)
    monkeypatch.setattr(manifest_table, "SLICE", many)
    monkeypatch.setattr(stored_rows, "FILE_BYTES", rng.choice([1, 1 << 20]))
    monkeypatch.setattr(row_groups, "SHARDS", rng.choice([1, 3, 4096]))
    expected = earlier_file(rows, rows_each)
    mixed = rng.sample(rows, len(rows))
    for number, way in enumerate((mixed, pa.Table.from_pylist(mixed, schema=SCHEMA), collected(shards, rng))):
        place = tmp_path / str(number)
        made = manifest.write(Location(str(place)), way, META)
        kept = place / manifest.VERSIONS / manifest.version_name(made.digest)
        assert (place / manifest.FILE).read_bytes() == kept.read_bytes() == expected
        read = manifest.read(Location(str(place)))
        assert read.chunks.equals(made.chunks) and read.meta == made.meta
        assert read.paths == [one[0]["path"] for one in shards]
        assert read.sizes == {one[0]["path"]: one[0]["file_bytes"] for one in shards}


def test_a_manifest_has_the_row_groups_that_pyarrow_would_choose():
    """Earlier versions left the number of rows to pyarrow."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": pa.nulls(manifest_table.PARQUET_ROWS + 1, pa.int8())}), sink)
    metadata = pq.read_metadata(sink)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [manifest_table.PARQUET_ROWS, 1]


def test_a_run_of_an_earlier_version_is_continued(tmp_path):
    """Records with `chunks` are taken as they are: no shard is written again, and the dataset is the same."""
    make_input(tmp_path / "in")
    (rows, meta), _ = make(tmp_path, "out", STAGES)
    records = list((tmp_path / "out.work" / "done" / "shards").iterdir())
    for path in records:
        record = json.loads(path.read_text())
        for shard in record["shards"]:
            shard["chunks"] = [row for row in rows if row["path"] == shard["path"]]
            del shard["row_groups"], shard["footer"]
        path.write_text(json.dumps(record))
    again, flow = make(tmp_path, "out", STAGES)
    assert again == (rows, meta) and flow.kept["shards"] == len(records) > 3 and "shards" not in flow.done


def memory_of(shards: int, groups: int) -> int:
    """Collects and writes row groups. Returns the bytes that the driver still has at the end, in Python and in Arrow."""
    record = row_groups.listed(shard_rows(random.Random(0), 0, groups))
    tracemalloc.start()
    try:
        before, collector = pa.total_allocated_bytes(), ShardCollector()
        for number in range(shards):
            collector.add(record | {"path": f"shards/{number:05d}/{number:016x}.parquet"})
        rows = collector.rows()
        manifest_table.digest(rows, META)
        return tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()


def test_the_driver_holds_150_bytes_per_shard_and_nothing_per_row_group(monkeypatch):
    monkeypatch.setattr(stored_rows, "FILE_BYTES", 1)
    memory_of(1, 1)  # imports pandas
    few, many, larger = memory_of(1_000, 2), memory_of(6_000, 2), memory_of(1_000, 40)
    assert 50 < (many - few) / 5_000 < 150
    assert (larger - few) / 38_000 < 1


def test_stored_rows_of_a_part_are_those_of_the_table():
    """A collection's parts are folders, and each part is a dataset with its own manifest."""
    rng = random.Random(1)
    shards = [[{**row, "path": f"{name}/{row['path']}"} for row in shard_rows(rng, shard, 3)]
              for shard in range(20) for name in ("16x16", "16x8")]  # fmt: skip
    stored = collected(shards, rng)
    for name in ("16x16", "16x8", "8x8"):
        part, table = (collection._inside(rows, f"{name}/") for rows in (stored, manifest_table.in_memory(stored)))
        assert len(part) == len(table) and manifest_table.digest(part, META) == manifest_table.digest(table, META)


def test_a_full_disk_names_the_folder(monkeypatch):
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(stored_rows, "temporary", lambda: full)
        with pytest.raises(StorageError, match=r"can't store the rows of the manifest .*No space left.* set TMPDIR"):
            collected([shard_rows(random.Random(0), 0, 1)], random.Random(0))


def test_a_disk_that_becomes_full_is_one_error(monkeypatch, tmp_path):
    """The rest of a file that doesn't fit must not fail again when the file is closed: with another error, or on the terminal."""
    monkeypatch.setattr(stored_rows, "FILE_BYTES", 1)
    later, shards = list[Any](), [shard_rows(random.Random(0), 0, 2_000)]
    monkeypatch.setattr(sys, "unraisablehook", later.append)
    rows, limits = collected(shards, random.Random(0)), resource.getrlimit(resource.RLIMIT_FSIZE)
    manifest_table.digest(rows, META)  # all rows are on the disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        for write in (lambda: manifest.write(Location(str(tmp_path)), rows, META), lambda: collected(shards, random.Random(0))):
            with pytest.raises(StorageError, match=r"can't store the rows of the manifest .*File too large.* set TMPDIR"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert not later


def test_a_path_that_is_not_text_makes_a_manifest_unreadable(tmp_path):
    """Also with the right digest: one DataError, not a crash where the path is used."""
    table = pa.Table.from_pylist(shard_rows(random.Random(0), 0, 1), schema=SCHEMA)
    bad = pa.array([b"shards/\xff.parquet"], pa.binary()).view(pa.string())
    table = table.set_column(0, SCHEMA.field("path"), bad)
    meta = META | {"digest": manifest_table.digest(table, META)}
    pq.write_table(table.replace_schema_metadata({"heliostat": json.dumps(meta)}), Path(tmp_path, manifest.FILE))
    with pytest.raises(DataError, match=r"isn't a heliostat manifest, or is damaged"):
        manifest.read(Location(str(tmp_path)))
