"""Tests a document's pieces in a shard, bad samples and their replacements, and the information in an id."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.cluster.capacity import LivingNode
from heliostat.curation.text import tokens
from heliostat.curation.text.trace import origin
from heliostat.data import documents, manifest
from heliostat.data.manifest import PLACES_KEY
from heliostat.storage.locations import Location
from heliostat.tracking.lineage_lines import node_line
from heliostat.tracking.lineage_of_documents import with_replaced


@pytest.mark.parametrize(
    ("id", "told"),
    [
        ("a/b.warc.gz#4821", {"file": "a/b.warc.gz", "byte": 4821}),
        ("b.jsonl.zst#3", {"file": "b.jsonl.zst", "line": 3}),
        ("c.parquet#7", {"file": "c.parquet", "row": 7}),
        ("d#x.html", {"file": "d#x.html"}),
        ("own/repo.tar.gz#src/a#b.py", {"file": "own/repo.tar.gz", "path": "src/a#b.py"}),
        ("own/repo/.git#12", {"file": "own/repo/.git", "path": "12"}),
        ("plain.txt", {"file": "plain.txt"}),
    ],
)
def test_an_id_tells_where_a_document_was_read(id, told):
    assert origin(id) == told


def test_a_document_is_found_in_every_chunk_that_holds_some_of_it(tmp_path):
    """By its tokens: the named pieces are exactly the document."""
    sizes = [40, 700, 5, 90, 33]
    ids, encoded = list("abcde"), [np.full(n, 10 + i, np.int32) for i, n in enumerate(sizes)]
    location = Location(str(tmp_path))
    location.join("shards/00000/x.parquet").write(tokens.shard(ids, encoded, 100, np.arange(5, 0, -1)))
    rows = manifest.read_footer(location, "shards/00000/x.parquet", "tokens")
    made = manifest.write(location, rows, {"kind": "tokens"})
    file = pq.ParquetFile(tmp_path / "shards/00000/x.parquet")
    for i, id in enumerate(ids):
        found = documents.pieces(made, "shards/00000/x.parquet", id)
        held = [
            file.read_row_group(p.row_group)["tokens"].combine_chunks().flatten()[p.first : p.first + p.tokens] for p in found
        ]
        assert [t for part in held for t in part.to_pylist()] == [10 + i] * sizes[i]
        assert all(made.chunks["row_group"][p.chunk].as_py() == p.row_group for p in found)
    assert len(documents.pieces(made, "shards/00000/x.parquet", "b")) > 1
    assert documents.pieces(made, "shards/00000/x.parquet", "z") == []


def test_a_pieces_samples_are_those_that_hold_some_of_its_tokens():
    piece = documents.Piece(0, 0, first=30, tokens=21)
    for length in (1, 7, 10, 31, 100):
        assert list(piece.samples(length)) == sorted({t // length for t in range(30, 51)})


def test_bad_samples_do_not_count_and_those_in_their_place_do():
    place = {"dataset": "d", "shard": "s", "row_group": 0}
    mine = [{**place, "step": step, "lane": 0, "place": 0, "epoch": 0, "row": row} for step, row in ((3, 7), (9, 7), (9, 8))]
    other = {**place, "row_group": 5, "row": 1}
    replaced = [
        {**place, "row": 7, "step": 9, "replaced_by": other},
        {**other, "step": 4, "replaced_by": {**place, "row": 8}},
        {**other, "step": 5, "replaced_by": {**place, "row": 9}},
    ]
    found = with_replaced(mine, replaced, {("d", "s", 0): range(7, 9)})
    assert [(s["step"], s["row"], s["lane"]) for s in found] == [(3, 7, 0), (4, 8, None), (9, 8, 0)]


def test_a_shard_without_a_document_keeps_the_others_in_their_chunks_and_places():
    """A document that alone fills row groups is removed with them. A shard of one document becomes no shard."""
    sizes = [40, 700, 5, 90, 33]
    ids, encoded = list("abcde"), [np.arange(n, dtype=np.int32) + 1000 * i for i, n in enumerate(sizes)]
    old = pq.ParquetFile(pa.BufferReader(tokens.shard(ids, encoded, 100, np.arange(50, 0, -10))))
    for gone, id in enumerate(ids):
        data, text = tokens.without(old, {id})
        assert text.tolist() == encoded[gone].tolist()
        new, place = pq.ParquetFile(pa.BufferReader(data)), 0
        places = [json.loads(f.metadata.metadata[PLACES_KEY]) for f in (old, new)]
        for group in range(old.num_row_groups):
            left = [row for row in old.read_row_group(group).to_pylist() if row["document"] != id]
            if left:
                assert new.read_row_group(place).to_pylist() == left and places[1][place] == places[0][group]
                place += 1
        assert place == new.num_row_groups == len(places[1])
        assert new.metadata.metadata[b"content"] != old.metadata.metadata[b"content"]
    alone = pq.ParquetFile(pa.BufferReader(tokens.shard(["a"], [encoded[0]], 100)))
    assert tokens.without(alone, {"a"})[0] is None and tokens.without(alone, {"b"})[1].tolist() == []


def test_the_lineage_does_not_take_rays_logical_cpus_for_the_machines():
    node: LivingNode = {"host": "h", "address": "127.0.0.1", "cpus": 7.0, "gpus": 0.0, "accelerators": [], "memory_gib": 1.0,
                        "labels": {}}  # fmt: skip
    assert node_line(node) == "node h (127.0.0.1), 7 logical CPUs in Ray"
    assert node_line({**node, "gpus": 2.0, "accelerators": ["H100"]}).endswith("in Ray, 2 GPUs H100")
