"""Tests that documents longer than a row group are split, held out, and read back as a whole."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.storage.locations import Location

from tests.seeds import every_seed
from tests.unit.test_text_pipeline import KNOWN_SHARD

# documents longer than a chunk ---------------------------------------------------------------------------------------


@every_seed(12)
def test_no_chunk_is_longer_than_twice_the_target_and_no_token_is_lost(seed):
    """For any documents, all tokens are in order, with as many complete sequences as in row groups that end with documents."""
    rng = np.random.default_rng(seed)
    target = int(rng.choice([1000, 1024, 4000, 50_000]))
    lengths = rng.integers(1, target // 4, 60)
    lengths[rng.choice(60, 3, replace=False)] = rng.integers(2 * target, 9 * target, 3)
    groups = [rows for rows, _ in tokens.chunks(lengths, target)]
    assert max(map(sum, groups)) <= 2 * target and min(min(g) for g in groups) > 0
    assert sum(map(sum, groups)) == lengths.sum()
    whole = [int(lengths[a:b].sum()) for a, b in tokens.cut(lengths, target)]
    assert max(whole) > 2 * target
    for length in (n for n in (2, 8, 16, 24, 30, 32, 48, 60, 64, 480, 1024, 1280, 3072) if tokens.piece(target) % n == 0):
        assert sum(sum(g) // length for g in groups) == sum(n // length for n in whole)
    assert tokens.piece(1_000_000) == 983_040 and all(983_040 % n == 0 for n in (2048, 8192, 65_536, 1536, 3072, 2560))


@every_seed(6)
def test_no_document_is_held_out_in_part_even_one_that_is_cut(seed):
    """For any held-out fraction, the row groups on both sides have different documents."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 400, 200)
    lengths[rng.choice(200, 10, replace=False)] = rng.integers(3000, 9000, 10)
    places = np.sort(rng.integers(0, manifest.PLACES, 200))[::-1]
    made = tokens.chunks(lengths, 1000, places)
    ends, begin, documents = np.cumsum(lengths), 0, []
    for rows, _ in made:
        inside = np.arange(begin, begin + sum(rows))
        documents.append(set(np.searchsorted(ends, inside, side="right").tolist()))
        begin += sum(rows)
    for fraction in rng.random(200):
        held = [bool(place < fraction * manifest.PLACES) for _, place in made]
        sides = [set().union(*(d for d, h in zip(documents, held, strict=True) if h is side)) for side in (True, False)]
        assert not sides[0] & sides[1]


@pytest.mark.parametrize("seed", range(6))
def test_documents_of_one_place_are_never_on_both_sides(seed):
    """For example, those of a repository with many row groups. No row group ends within a document that fits into one."""
    rng = np.random.default_rng(seed)
    groups = np.sort(rng.integers(0, manifest.PLACES, 40))[::-1]
    places = np.repeat(groups, rng.integers(1, 60, 40))
    lengths = rng.integers(1, 300, len(places))
    made, found = tokens.chunks(lengths, 1000, places), 0
    sizes = [size for rows, _ in made for size in rows]
    assert sizes == lengths.tolist() and max(sum(rows) for rows, _ in made) <= 2000
    for fraction in (*rng.random(50), 0.01, 0.1):
        sides, begin = dict[int, set[bool]](), 0
        for rows, place in made:
            for one in places[begin : begin + len(rows)].tolist():
                sides.setdefault(one, set()).add(place < fraction * manifest.PLACES)
            begin += len(rows)
        assert all(len(side) == 1 for side in sides.values())
        found += sum(len(side) for side in sides.values())
    assert found and len(made) > 20


def test_chunks_of_usual_documents_are_what_they_always_were():
    """Compares known bytes: the digests of datasets without long documents don't change."""
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 999, int(n)).astype(np.int32) for n in rng.integers(1, 400, 90)]
    data = tokens.shard([str(i) for i in range(90)], made, 1000)
    assert hashlib.sha256(data).hexdigest()[:16] == KNOWN_SHARD


def test_a_cut_document_is_read_as_the_tokens_that_it_was(tmp_path):
    """Its rows have its name, and only the last one ends with the end of the document."""
    rng = np.random.default_rng(0)
    made = [np.append(rng.integers(1, 999, n), 0).astype(np.int32) for n in (300, 18_000, 200, 900, 5000)]
    names = ["a", "long", "b", "c", "longer"]
    (tmp_path / "x.parquet").write_bytes(tokens.shard(names, made, 1000))
    found: dict[str, list[int]] = {}
    for row in pq.read_table(tmp_path / "x.parquet").to_pylist():
        assert row["tokens"] and found.get(row["document"], [1])[-1] != 0, "a document goes on behind its end"
        found.setdefault(row["document"], []).extend(row["tokens"])
    assert {name: found[name] for name in names} == {n: t.tolist() for n, t in zip(names, made, strict=True)}
    chunks = manifest.read_footer(Location(str(tmp_path)), "x.parquet", "tokens")
    assert max(c["tokens"] for c in chunks) <= 2000 and sum(c["tokens"] for c in chunks) == sum(map(len, made))
