"""Tests that shards and row groups that were exchanged before the training are not trained on."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from heliostat.data import manifest, shard
from heliostat.data.dataset import Dataset
from heliostat.storage.locations import Location

from tests.unit.test_dataset import make_plan

# exchanged shards ----------------------------------------------------------------------------------------------------


def plain(folder: Path, seeds: tuple[int, ...], listed: bool = True) -> manifest.Manifest:
    """Writes shards of the same shape and size for any tokens, as `prepare` lists them or (not `listed`) as `index` does."""
    rows = []
    (folder / "shards").mkdir(parents=True)
    for number, seed in enumerate(seeds):
        tokens = np.random.default_rng(seed).integers(0, 60_000, (40, 25)).astype(np.int32).tolist()
        path = folder / f"shards/{number}.parquet"
        pq.write_table(pa.table({"tokens": pa.array(tokens, pa.list_(pa.int32()))}), path, row_group_size=10, compression="none",
                       use_dictionary=False, write_statistics=False, write_page_checksum=True)  # fmt: skip
        found = manifest.read_footer(Location(str(folder)), f"shards/{number}.parquet", "tokens")
        digests = shard.content_digests(path.read_bytes(), "tokens")
        rows += [{**r, "content": d if listed else ""} for r, d in zip(found, digests, strict=True)]
    return manifest.write(Location(str(folder)), rows, {"kind": "tokens"})


def replaced(source: manifest.Manifest) -> tuple[set[str], set[str]]:
    """Returns the shards whose samples are replaced in the first epoch, with the reasons."""
    data = Dataset(make_plan(source, held=0.0))
    found = data.load(np.arange(int(data.order.epoch_samples[0])))
    return {source.chunks["path"][b.chunk].as_py() for b in found.bad}, {b.reason.partition("(")[2] for b in found.bad}


def test_a_shard_exchanged_before_training_is_not_trained_on(tmp_path):
    """The other shard is complete, valid, and of the same shape. All its samples are replaced, with the reason."""
    made, other = plain(tmp_path / "a", (1, 2, 3)), plain(tmp_path / "b", (4, 5, 6))
    assert replaced(made) == (set(), set())
    file = tmp_path / "a/shards/1.parquet"
    pq.write_table(pq.read_table(other.location.join("shards/1.parquet").path), file, compression="none", use_dictionary=False,
                   write_statistics=["tokens.list.element"], row_group_size=10)  # fmt: skip
    shards, reasons = replaced(made)
    assert shards == {"shards/1.parquet"}
    assert reasons == {"this is another shard: its footer differs from the manifest's)"}


def test_a_chunk_exchanged_under_its_footer_is_not_trained_on(tmp_path):
    """The other row group has the same size and valid checksums, but not the listed bytes. The shard's other row groups are
    used."""
    made, mine = plain(tmp_path / "a", (1, 2, 3)), tmp_path / "a/shards/1.parquet"
    start, end = shard.extent(pq.read_metadata(mine), 2, "tokens")
    for seed in range(10, 200):  # the length of a checksum in a page's header varies by a byte
        plain(tmp_path / f"{seed}", (seed,))
        theirs = tmp_path / f"{seed}/shards/0.parquet"
        if shard.extent(pq.read_metadata(theirs), 2, "tokens") == (start, end):
            break
    mine.write_bytes(mine.read_bytes()[:start] + theirs.read_bytes()[start:end] + mine.read_bytes()[end:])
    pq.read_table(mine, page_checksum_verification=True)
    shards, reasons = replaced(made)
    assert shards == {"shards/1.parquet"} and reasons == {"its bytes differ from those that the manifest lists)"}
    data = Dataset(make_plan(made, held=0.0))
    found = data.load(np.arange(int(data.order.epoch_samples[0])))
    assert {made.chunks["row_group"][b.chunk].as_py() for b in found.bad} == {2}


def test_a_manifest_without_content_digests_reads_as_it_did(tmp_path):
    """For manifests from before the digests, and for shards that `index` added without reading them, the footers are compared."""
    made = plain(tmp_path / "a", (1, 2), listed=False)
    rows = [{k: v for k, v in row.items() if k != "content"} for row in made.chunks.to_pylist()]
    old = manifest.write(made.location, rows, {"kind": "tokens"})
    assert set(old.chunks["content"].to_pylist()) == {""} and old.digest == made.digest
    assert manifest.read(old.location).chunks.equals(old.chunks)
    samples = Dataset(make_plan(old)).order.locate(np.arange(40))
    assert np.array_equal(Dataset(make_plan(old)).read(samples), Dataset(make_plan(made)).read(samples))
    assert replaced(made) == replaced(old) == (set(), set())
