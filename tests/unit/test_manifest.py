"""Tests the manifest, which is a dataset's identity: every change changes its digest, and damage is a DataError."""

import copy
import random
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.data import manifest
from heliostat.data.manifest_table import LATER
from heliostat.errors import DataError, StorageError
from heliostat.storage.locations import Location

META = {"kind": "tokens", "tokenizer": "ab" * 32, "vocab_size": 100, "counts": {"documents": 7}}


def some_rows(rng: random.Random, n: int = 12) -> list[dict]:
    return [
        {"path": f"shards/{i // 3:05d}.parquet", "row_group": i % 3, "rows": rng.randrange(1, 99), "tokens": rng.randrange(10**6),
         "bytes": rng.randrange(10**6), "file_bytes": rng.randrange(10**9), "footer": f"{rng.getrandbits(128):032x}",
         "place": rng.choice([-1, rng.randrange(manifest.PLACES)])}
        for i in range(n)
    ]  # fmt: skip


def shard(path: Path, lengths: list[int], group: int, seed: int = 0) -> Path:
    """Writes a real shard of documents with the given lengths, `group` per row group."""
    rng = np.random.default_rng(seed)
    documents = pa.array([rng.integers(0, 1000, n).tolist() for n in lengths], pa.list_(pa.int32()))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": [str(i) for i in range(len(lengths))], "tokens": documents}), path, row_group_size=group)
    return path


@pytest.mark.parametrize("seed", range(10))
def test_what_is_written_is_what_is_read(tmp_path, seed):
    """Rows are read in the order of path and row group, for any order at writing, with the metadata and the digest."""
    rng = random.Random(seed)
    rows = some_rows(rng, rng.randrange(1, 40))
    mixed = rng.sample(rows, len(rows))
    written = manifest.write(Location(str(tmp_path)), mixed, META)
    found = manifest.read(Location(str(tmp_path)))
    assert found.chunks.equals(written.chunks)
    assert found.chunks.to_pylist() == [{**LATER, **row} for row in rows]
    assert found.meta == written.meta == {**META, "digest": manifest.digest(written.chunks, META)}
    assert (found.kind, found.digest) == ("tokens", written.digest)
    assert (found.tokens, found.rows) == (sum(r["tokens"] for r in rows), sum(r["rows"] for r in rows))


def test_the_digest_changes_with_any_value_of_any_row_and_with_any_metadata(tmp_path):
    """Every column of every row counts, and so do added, missing, and exchanged rows, and each metadata key."""
    rows = some_rows(random.Random(0))

    def digest(rows: list[dict], meta: dict) -> str:
        return manifest.digest(pa.Table.from_pylist(rows, schema=manifest.SCHEMA), meta)

    seen = {digest(rows, META)}
    variants = 1
    for i, row in enumerate(rows):
        for key, value in row.items():
            changed = copy.deepcopy(rows)
            changed[i][key] = value + 1 if isinstance(value, int) else value[:-1] + ("0" if value[-1] != "0" else "1")
            seen.add(digest(changed, META))
            variants += 1
        seen.add(digest(rows[:i] + rows[i + 1 :], META))
        variants += 1
    seen.add(digest([rows[1], rows[0], *rows[2:]], META))
    for meta in ({**META, "vocab_size": 101}, {**META, "counts": {"documents": 8}}, {**META, "new": None}, {"kind": "tokens"}):
        seen.add(digest(rows, meta))
    assert len(seen) == variants + 5


def test_the_digest_does_not_depend_on_encoding_or_on_itself():
    """The 64 hex digits are the same for chunked tables, with the digest itself in the metadata, and for any order of keys."""
    rows = some_rows(random.Random(1))
    whole = pa.Table.from_pylist(rows, schema=manifest.SCHEMA)
    pieces = pa.concat_tables([whole.slice(0, 5), whole.slice(5, 1), whole.slice(6)])
    expected = manifest.digest(whole, META)
    assert len(expected) == 64 and int(expected, 16) >= 0
    for meta in (META, {**META, "digest": expected}, dict(reversed(META.items()))):
        assert manifest.digest(pieces, meta) == expected


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path):
    """The error names the missing file and the command that makes it."""
    lacks = r"no dataset here \(manifest.parquet is missing\)\. Prepare it: heliostat data prepare"
    with pytest.raises(DataError, match=rf"{lacks} PIPELINE\.yaml$"):
        manifest.read(Location(str(tmp_path)))


@pytest.mark.parametrize("output", ["data/mine", "./data/mine", "'data/mine'  # a comment", "TMP/data/mine"])
def test_the_error_for_a_missing_dataset_names_its_pipeline(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/a.yaml").write_text("output: data/mine2\nwork: data/mine\n")
    (tmp_path / "pipelines/b.yaml").write_text(f"name: b\noutput: {output.replace('TMP', str(tmp_path))}\n")
    (tmp_path / "c.yaml").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"Prepare it: heliostat data prepare pipelines/b\.yaml$"):
        manifest.read(Location(str(tmp_path / "data/mine")))


def test_every_version_that_was_written_stays_readable(tmp_path):
    """By its digest, with its rows and metadata. Without a digest, the newest is read. Writing a version again adds nothing."""
    place, rng = Location(str(tmp_path)), random.Random(0)
    written = [manifest.write(place, some_rows(rng, n), {**META, "counts": n}) for n in (1, 7, 3, 12)]
    again = manifest.write(place, written[1].chunks.to_pylist(), {**META, "counts": 7})
    for version in written:
        found = manifest.read(place, version.digest)
        assert found.chunks.equals(version.chunks) and found.meta == version.meta
    assert manifest.read(place).digest == again.digest == written[1].digest
    names = sorted(p.name for p in (tmp_path / manifest.VERSIONS).iterdir())
    assert names == sorted(f"{v.digest[:12]}.parquet" for v in written)


def test_a_version_is_kept_before_it_becomes_the_newest(tmp_path, monkeypatch):
    """After an interruption at any point, the newest manifest is among the versions."""
    place, rng = Location(str(tmp_path)), random.Random(0)
    first = manifest.write(place, some_rows(rng, 3), META)
    real = Location.upload_open

    def broken(self: Location, file: IO[bytes]) -> None:
        if self.name == manifest.FILE:
            raise StorageError("pulled the plug")
        real(self, file)

    monkeypatch.setattr(Location, "upload_open", broken)
    with pytest.raises(StorageError):
        manifest.write(place, some_rows(rng, 5), META)
    assert manifest.read(place).digest == manifest.read(place, first.digest).digest == first.digest


def test_a_dataset_without_kept_versions_still_reads(tmp_path):
    """For datasets from before versions were kept: the newest is read with and without its digest, and `keep` adds it."""
    place = Location(str(tmp_path))
    made = manifest.write(place, some_rows(random.Random(0)), META)
    place.join(manifest.VERSIONS).delete()
    assert manifest.read(place).digest == manifest.read(place, made.digest).digest == made.digest
    manifest.keep(manifest.read(place))
    manifest.write(place, some_rows(random.Random(1)), META)
    assert manifest.read(place, made.digest).chunks.equals(made.chunks)


def test_a_version_that_is_not_there_is_named_with_the_one_that_is(tmp_path):
    """DataError has both digests, also if the version's file holds another version, or is damaged."""
    place = Location(str(tmp_path))
    old, new = (manifest.write(place, some_rows(random.Random(i)), META) for i in range(2))
    with pytest.raises(DataError, match=f"digest {new.digest[:12]}, was 000000000000.*didn't keep the earlier version"):
        manifest.read(place, "0" * 64)
    kept = {v.digest: tmp_path / manifest.VERSIONS / f"{v.digest[:12]}.parquet" for v in (old, new)}
    kept[old.digest].write_bytes(kept[new.digest].read_bytes())
    with pytest.raises(DataError, match=f"{old.digest[:12]}.parquet has digest {new.digest}, not {old.digest}"):
        manifest.read(place, old.digest)
    kept[old.digest].write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"{old.digest[:12]}\.parquet: isn't a heliostat manifest, or is damaged"):
        manifest.read(place, old.digest)


def test_a_changed_manifest_is_refused(tmp_path):
    """A valid table with edited rows doesn't match its own digest."""
    place = Location(str(tmp_path))
    manifest.write(place, some_rows(random.Random(0)), META)
    table = pq.read_table(tmp_path / manifest.FILE)
    edited = table.set_column(3, "tokens", pa.array(table["tokens"].to_numpy() + 1))
    pq.write_table(edited, tmp_path / manifest.FILE)
    with pytest.raises(DataError, match="doesn't match its own digest"):
        manifest.read(place)


def test_a_damaged_manifest_is_never_read_as_another(tmp_path):
    """Truncated anywhere, or with any flipped bit: DataError or, for an unused bit, exactly the written manifest."""
    place, file, rng = Location(str(tmp_path)), tmp_path / manifest.FILE, random.Random(0)
    good = manifest.write(place, some_rows(rng, 60), META)
    raw, refused = file.read_bytes(), 0
    for trial in range(400):
        damaged = bytearray(raw)
        if trial % 4:
            damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(raw)) :]
        file.write_bytes(bytes(damaged))
        try:
            found = manifest.read(place)
        except DataError as e:
            assert str(file) in str(e)
            refused += 1
        else:
            assert found.chunks.equals(good.chunks) and found.meta == good.meta
    assert refused > 200


@pytest.mark.parametrize("table", [pa.table({"a": [1]}), pa.table({n: [None] for n in manifest.SCHEMA.names})])
@pytest.mark.parametrize("meta", [None, b"[]", b"{}", b"{", b'"x"'])
def test_another_parquet_file_is_not_taken_for_a_manifest(tmp_path, table, meta):
    """With other columns, no metadata, or metadata that isn't an object, one DataError names the file."""
    pq.write_table(table.replace_schema_metadata({"heliostat": meta} if meta else None), tmp_path / manifest.FILE)
    with pytest.raises(
        DataError, match=r"manifest\.parquet: isn't a heliostat manifest, or is damaged\. Prepare the dataset again$"
    ):
        manifest.read(Location(str(tmp_path)))


@pytest.mark.parametrize("seed", range(10))
def test_a_footer_says_what_the_shard_holds(tmp_path, seed):
    """Rows, tokens, and sizes of every row group, from the footer, equal those of the data. A file has one digest."""
    rng = random.Random(seed)
    lengths, group = [rng.randrange(1, 60) for _ in range(rng.randrange(1, 90))], rng.randrange(1, 30)
    path = shard(tmp_path / "shards" / "a.parquet", lengths, group, seed)
    rows = manifest.read_footer(Location(str(tmp_path)), "shards/a.parquet", "tokens")
    groups = [lengths[i : i + group] for i in range(0, len(lengths), group)]
    assert [(r["rows"], r["tokens"]) for r in rows] == [(len(g), sum(g)) for g in groups]
    assert [(r["path"], r["row_group"]) for r in rows] == [("shards/a.parquet", i) for i in range(len(groups))]
    assert {r["file_bytes"] for r in rows} == {path.stat().st_size} and len({r["footer"] for r in rows}) == 1
    assert 0 < sum(r["bytes"] for r in rows) < path.stat().st_size
    assert [r["tokens"] for r in manifest.read_footer(Location(str(tmp_path)), "shards/a.parquet", None)] == [0] * len(groups)


def test_a_footer_larger_than_the_first_read_is_read_whole(tmp_path):
    """Thousands of row groups make a footer of more than 64 KiB, with the same content."""
    lengths = [1 + i % 5 for i in range(1500)]
    path = shard(tmp_path / "big.parquet", lengths, 1)
    assert int.from_bytes(path.read_bytes()[-8:-4], "little") > 64 << 10
    assert [r["tokens"] for r in manifest.read_footer(Location(str(tmp_path)), "big.parquet", "tokens")] == lengths


def test_footer_digests_tell_shards_apart(tmp_path):
    """Shards of the same shape with other contents have other digests. A copy has the same digest."""
    lengths = [5, 9, 30, 2]
    for name, seed in (("a", 0), ("b", 0), *((f"c{i}", i) for i in range(1, 20))):
        shard(tmp_path / f"{name}.parquet", lengths, 2, seed)
    found = {p.stem: manifest.read_footer(Location(str(tmp_path)), p.name, "tokens")[0]["footer"] for p in tmp_path.iterdir()}
    assert found["a"] == found["b"] and len(set(found.values())) == 20


def test_a_damaged_shard_is_a_data_error_that_names_it(tmp_path):
    """Truncated at any length, with foreign bytes, or with a flipped bit in the footer: DataError, or a footer that is still
    readable."""
    raw, rng = shard(tmp_path / "good.parquet", [7] * 40, 10).read_bytes(), random.Random(0)
    place, bad = Location(str(tmp_path)), tmp_path / "bad.parquet"
    for size in [0, 1, 3, 4, 7, 8, 11, 12, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(100))]:
        bad.write_bytes(raw[:size])
        with pytest.raises(DataError, match=r"bad\.parquet: isn't a readable Parquet file"):
            manifest.read_footer(place, "bad.parquet", "tokens")
    bad.write_bytes(bytes(200_000) + b"\xff\xff\xff\xffPAR1")  # claims a footer of 4 GB
    with pytest.raises(DataError, match=r"bad\.parquet: isn't a readable Parquet file"):
        manifest.read_footer(place, "bad.parquet", "tokens")
    refused = 0
    footer = int.from_bytes(raw[-8:-4], "little") + 8
    for _ in range(400):
        damaged = bytearray(raw)
        damaged[-1 - rng.randrange(footer)] ^= 1 << rng.randrange(8)
        bad.write_bytes(bytes(damaged))
        try:
            manifest.read_footer(place, "bad.parquet", "tokens")
        except DataError as e:
            assert "bad.parquet" in str(e)
            refused += 1
    assert refused > 40


def test_a_missing_shard_and_a_missing_column_are_named(tmp_path):
    """DataError has the file, and the column that it lacks."""
    shard(tmp_path / "a.parquet", [1, 2], 2)
    with pytest.raises(DataError, match=r"gone\.parquet"):
        manifest.read_footer(Location(str(tmp_path)), "gone.parquet", "tokens")
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'text'"):
        manifest.read_footer(Location(str(tmp_path)), "a.parquet", "text")


def test_samples_are_whole_sequences_or_rows():
    """A row group of tokens gives floor(tokens / length) samples; a row group of rows gives its rows."""
    rows = some_rows(random.Random(2))
    chunks = pa.Table.from_pylist(rows, schema=manifest.SCHEMA)
    for length in (2, 7, 1024, 10**7):
        tokens = manifest.Manifest(Location("x"), chunks, {"kind": "tokens"})
        assert tokens.samples(length).tolist() == [r["tokens"] // length for r in rows]
    assert manifest.Manifest(Location("x"), chunks, {"kind": "rows"}).samples(None).tolist() == [r["rows"] for r in rows]
