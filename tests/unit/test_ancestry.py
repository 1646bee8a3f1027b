"""Tests which datasets have the same documents, where a pack contains a conversation, and the list of a run's exports."""

import json
import logging

import pyarrow.parquet as pq
import pytest
from heliostat.data import ancestry, documents, manifest
from heliostat.data.ancestry import MADE_FROM
from heliostat.data.manifest import Manifest
from heliostat.errors import DataError
from heliostat.runs import exports
from heliostat.storage.locations import Location

from tests.unit import build_conversations


@pytest.mark.parametrize("pack", [True, False])
def test_a_conversation_is_found_in_every_row_that_contains_it_and_in_no_other(tmp_path, pack):
    made = manifest.read(Location(str(build_conversations.packs(tmp_path / "data", 40, 64, pack))))
    (path,) = made.paths
    file, owners = pq.ParquetFile(tmp_path / "data" / path), dict[str, set[tuple[int, int]]]()
    for group in range(file.num_row_groups):
        for row, ids in enumerate(file.read_row_group(group)["ids"].to_pylist()):
            for id in ids:
                owners.setdefault(id, set()).add((group, row))
    assert len(owners) > 30 and file.num_row_groups > 1
    for id, rows in owners.items():
        pieces = documents.pieces(made, path, id)
        assert {(p.row_group, p.first) for p in pieces} == rows and all(list(p.samples(1)) == [p.first] for p in pieces)
        assert all(made.chunks["row_group"][p.chunk].as_py() == p.row_group for p in pieces)
    assert documents.pieces(made, path, "chat-9999") == []


def test_a_pair_is_found_in_its_row(tmp_path):
    made = manifest.read(Location(str(build_conversations.preferences(tmp_path / "data", 20))))
    (path,) = made.paths
    pieces = [documents.pieces(made, path, f"pair-{i:04d}") for i in range(20)]
    assert [(p.row_group, p.first, p.tokens) for (p,) in pieces] == [(i // 8, i % 8, 1) for i in range(20)]


def dataset(digest: str, **meta: object) -> Manifest:
    return Manifest(Location(f"/data/{digest}"), manifest.SCHEMA.empty_table(), {"digest": digest, "name": digest, **meta})


def test_versions_and_copies_are_related_in_both_directions_and_other_datasets_are_not():
    pairs = dataset("pairs")
    less = dataset("less", forgotten=[{"digest": "pairs", "ids": ["a"]}])
    scored = dataset("scored", **{MADE_FROM: ancestry.made_from(pairs)})
    scored_less = dataset("scored-less", forgotten=less.meta["forgotten"], **{MADE_FROM: ancestry.made_from(less)})
    again = dataset("again", **{MADE_FROM: ancestry.made_from(scored)})
    family = [ancestry.related(one.meta) for one in (pairs, less, scored, scored_less, again)]
    assert all(a & b for a in family for b in family)
    assert again.meta[MADE_FROM] == [{"name": "scored", "digest": "scored"}, {"name": "pairs", "digest": "pairs"}]
    assert not any(ancestry.related(dataset("other").meta) & one for one in family)
    assert ancestry.sources(again.meta) == {"scored", "pairs"} and ancestry.sources(less.meta) == set()


def test_a_damaged_list_of_exports_is_one_error_and_never_undoes_an_export(tmp_path, caplog):
    run = Location(str(tmp_path / "run"))
    assert exports.read(run) == []
    exports.add(run, tmp_path / "a", 10, False)
    exports.add(run, tmp_path / "b", 10, True)
    exports.add(run, tmp_path / "a", 20, False)
    assert [(one["folder"], one["step"], one["adapter"]) for one in exports.read(run)] == [
        (str(tmp_path / "b"), 10, True), (str(tmp_path / "a"), 20, False),
    ]  # fmt: skip
    run.join("exports.json").write(json.dumps([{"folder": 3}]).encode())
    with pytest.raises(DataError, match=r"exports\.json: isn't a valid list of a run's exports .*Delete the file"):
        exports.read(run)
    with caplog.at_level(logging.WARNING):
        exports.add(run, tmp_path / "c", 20, False)
    assert "the lineage won't list the export" in caplog.text
