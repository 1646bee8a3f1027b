"""Tests an index of documents: passages equal their documents, and an index's version has exactly the dataset's documents."""

import asyncio
import json
import os
from collections import Counter
from datetime import timedelta
from itertools import pairwise

import numpy as np
import pytest
from heliostat.apps.search import build, table, units
from heliostat.apps.search.search import SearchIndex
from heliostat.apps.search.tasks import IndexSettings, cut
from heliostat.apps.serve.asks import Search
from heliostat.apps.serve.shelf import Shelf
from heliostat.errors import ConfigError, DataError, LeaseError
from heliostat.inference.batch.run import WORK
from heliostat.schema import validate
from heliostat.storage import lease
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work
from heliostat.web.refusals import Refusal

from tests.unit.build_curation import HereFlow, KilledError
from tests.unit.build_document_index import CORPUS, LONG, SETTINGS, index, named, rows, write_dataset
from tests.unit.build_pipeline import Here, make_dataset
from tests.unit.test_samples import TEXTS


@pytest.mark.parametrize("size", [4, 7, 16, 1000])
@pytest.mark.parametrize("lines", [0, 1, 9])
def test_passages_are_all_of_a_text_within_their_size_and_overlap(size, lines):
    """Each character is one token, and each line has a fixed number. The last quarter of a passage decides whether it ends with a
    line."""
    text = "".join("\n" if lines and i % lines == lines - 1 else chr(97 + i % 26) for i in range(103))
    places = cut(text, range(len(text)), size, size // 4)
    assert places[0][0] == 0 and places[-1][1] == len(text) and all(0 < b - a <= size for a, b in places)
    for (a, b), (c, _) in pairwise(places):
        assert a < c <= b and b - c <= size // 4
        near = text[a + size * 3 // 4 : a + size]
        assert "\n" not in near or text[b - 1] == "\n"


def test_a_character_of_several_tokens_is_in_one_passage_whole():
    """All tokens of the character begin at one place."""
    text = "aébéc"
    places = cut(text, [0, 1, 1, 2, 3, 3, 4], 2, 0)
    assert "".join(text[a:b] for a, b in places) == text


def test_no_text_has_no_passage():
    assert cut("", [], 16, 4) == []


@pytest.mark.parametrize(("asked", "told"), [({"overlap": 200}, "more than half"), ({"chunk_tokens": 3}, "chunk_tokens")])
def test_settings_that_go_nowhere_are_refused(asked, told):
    with pytest.raises(ConfigError, match=told):
        validate(IndexSettings, asked, "index-documents")


def test_each_passage_is_the_text_of_its_place(document_index, corpus):
    """The passage is read from the shard that it names, in another way than it was made. It equals the document."""
    found = rows(document_index)
    assert {row["document"] for row in found} == {id for id, text in CORPUS.items() if text.strip()}
    record = document_index.record
    assert (record["documents"], record["empty"], record["passages"]) == (len(CORPUS), 1, len(found))
    for row in found:
        text = CORPUS[row["document"]]
        assert row["text"] == text[row["begin"] : row["end"]] and len(row["digest"]) == 32
    long = [row for row in found if CORPUS[row["document"]] is LONG]
    assert long[0]["begin"] == 0 and long[-1]["end"] == len(LONG) and [row["number"] for row in long] == list(range(len(long)))
    assert len(set(corpus.paths)) == 2 and {row["shard"] for row in found} == set(corpus.paths)


def test_documents_that_are_rearranged_for_a_middle_are_indexed_as_their_texts(tmp_path):
    """Such a document has several spans, in several rows. Its passages have the places and numbers of one document."""
    texts = [LONG, "short text of its own", *TEXTS[:20]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    middles = {"rate": 0.7, "span_chars": 60}
    keys = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "data"), "chunk_tokens": 50}
    data = make_dataset(Here(name="t", **keys, fill_in_the_middle=middles, tokenizer={"vocab_size": 300}))
    told = index(data, tmp_path / "index")
    documents = {f"in.jsonl#{number}": text for number, text in enumerate(texts, 1)}
    found = rows(tmp_path / "index")
    assert told["documents"] == len(texts) and {row["document"] for row in found} == documents.keys()
    assert all(row["text"] == documents[row["document"]][row["begin"] : row["end"]] for row in found)
    long = [row for row in found if row["document"] == "in.jsonl#1"]
    assert [row["number"] for row in long] == list(range(len(long))) and long[-1]["end"] == len(LONG) and len(long) > 20


def test_units_have_every_row_group_once_and_no_document_leaves_one(corpus):
    """Units go down to single row groups, with complete documents."""
    for target in (1, 500, 1 << 20):
        listed = list(units.units(corpus, target))
        groups = [(unit.path, group.number) for unit in listed for group in unit.groups]
        assert groups == list(zip(*(corpus.chunks[name].to_pylist() for name in ("path", "row_group")), strict=True))
        found = [one for unit in listed for one in units.documents(corpus.location, unit, corpus.meta["end_of_document"])]
        assert Counter(one.id for one in found) == Counter(list(CORPUS))
    assert len(list(units.units(corpus, 1))) > 10


def test_a_run_that_is_killed_goes_on_and_lists_each_passage_once(corpus, tmp_path, monkeypatch):
    """The run is killed after each task. The passages equal those of an uninterrupted run, and nothing is found before the record
    exists."""
    monkeypatch.setattr(build, "LEAST", 200)
    index(corpus, tmp_path / "whole")
    broken = 0
    while True:
        try:
            told = index(corpus, tmp_path / "out", seed=broken, most=1)
            break
        except KilledError:
            broken += 1
            with pytest.raises(ConfigError, match="no index here"):
                SearchIndex(Location(str(tmp_path / "out")))
    assert broken > 2 and told["new"] <= 2
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_a_new_version_of_the_dataset_is_only_its_own_work(corpus, embedder, tmp_path):
    """Some documents are new, some removed, and one has another text; the counts show this. Known texts aren't embedded again,
    and the index equals one that is made from scratch."""
    first = index(corpus, tmp_path / "index", embedder)
    assert (first["added"], first["deleted"], first["kept"]) == (len(CORPUS) - 1, 0, 0)
    changed = {id: text for id, text in CORPUS.items() if id != "code.jsonl#3"} | {"code.jsonl#5": "def other(): pass"}
    changed |= {"more.jsonl#1": "def new(): return 'ω'", "more.jsonl#2": TEXTS[90]}
    later = write_dataset(tmp_path / "later", changed)
    second = index(later, tmp_path / "index", embedder)
    assert (second["added"], second["deleted"], second["kept"]) == (3, 2, len(CORPUS) - 3)
    assert 0 < second["embedded"] <= 6 < first["embedded"]
    index(later, tmp_path / "fresh", embedder)
    again, fresh = rows(tmp_path / "index"), rows(tmp_path / "fresh")
    assert [{**row, "embedding": None} for row in again] == [{**row, "embedding": None} for row in fresh]
    np.testing.assert_allclose([r["embedding"] for r in again], [r["embedding"] for r in fresh], atol=1e-5)
    found = SearchIndex(Location(str(tmp_path / "index"))).search([TEXTS[3]], "bm25", 50)[0]
    assert found and all(passage["document"] != "code.jsonl#3" for passage in found)
    assert found == SearchIndex(Location(str(tmp_path / "fresh"))).search([TEXTS[3]], "bm25", 50)[0]


def test_passages_that_are_cut_are_counted_also_where_their_embeddings_are_known(embedder, tmp_path):
    """The command reports each truncated passage, although equal texts are embedded only once."""
    long = "x(0) " * 90
    texts = named([long, "def f(): pass", long, "def g(): pass"])
    whole = IndexSettings(chunk_tokens=512, overlap=4)
    first = index(write_dataset(tmp_path / "data", texts, 1), tmp_path / "index", embedder, whole)
    later = write_dataset(tmp_path / "later", {**texts, "code.jsonl#4": "def h(): pass"}, 1)
    second = index(later, tmp_path / "index", embedder, whole)
    assert (first["truncated"], first["embedded"]) == (2, 3)
    assert (second["truncated"], second["embedded"]) == (2, 1)


def test_versions_that_were_replaced_long_ago_go_and_nothing_that_is_needed(corpus, tmp_path, monkeypatch):
    """The newest version shares fragments with the one before. It stays complete without a document, and so does a later
    version."""
    monkeypatch.setattr(build, "LEAST", 200)
    first = index(corpus, tmp_path / "index")
    monkeypatch.setattr(table, "KEEP", timedelta(0))
    gone = "code.jsonl#2"
    less = write_dataset(tmp_path / "less", {id: text for id, text in CORPUS.items() if id != gone})
    assert 0 < index(less, tmp_path / "index")["new"] < first["new"]
    with pytest.raises(DataError):
        table.open_version(Location(str(tmp_path / "index")), first["version"])
    left = rows(tmp_path / "index")
    assert {row["document"] for row in left} == {id for id, text in CORPUS.items() if text.strip() and id != gone}
    assert index(less, tmp_path / "index")["new"] == 0 and rows(tmp_path / "index") == left
    index(corpus, tmp_path / "index")
    index(corpus, tmp_path / "whole")
    assert rows(tmp_path / "index") == rows(tmp_path / "whole")


def test_who_reads_a_replaced_version_finds_the_columns_of_its_documents_for_a_day(tmp_path, monkeypatch):
    """This holds even if its record was written long before. Then the version is removed, and the endpoint reports it."""

    def brought_up_to_date(text: str) -> SearchIndex:
        lines = [{"text": text, "url": f"http://h/{text}"}, {"text": "another document", "url": "http://h/x"}]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        keys = {"name": "t", "input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "data"), "columns": ["url"]}
        made = make_dataset(Here(**keys, stages=[{"stage": "length", "min_chars": 2}], tokenizer={"vocab_size": 300}))
        index(made, tmp_path / "index")
        return SearchIndex(Location(str(tmp_path / "index")))

    first = brought_up_to_date("older text")
    for file in (tmp_path / "index" / "files").iterdir():
        os.utime(file, (0, 0))
    shelf = Shelf(str(tmp_path / "index"), None)
    second = brought_up_to_date("newer text")
    (found,) = asyncio.run(shelf.search(Search("older", 1)))
    assert found["columns"] == {"url": "http://h/older text"} == first.columns(found["document"])
    assert first.record["ends"] != second.record["ends"] and second.record["replaced"].keys() == {first.record["ends"][0][1]}
    monkeypatch.setattr(table, "KEEP", timedelta(0))
    third = brought_up_to_date("newest text")
    assert third.record["replaced"] == {} and len(list((tmp_path / "index" / "files").iterdir())) == len(third.record["ends"])
    with pytest.raises(Refusal, match="Restart the endpoint") as refused:
        asyncio.run(shelf.search(Search("older", 1)))
    assert refused.value.status == 503


def test_fragments_that_were_lost_are_made_again(corpus, tmp_path):
    index(corpus, tmp_path)
    was = rows(tmp_path)
    lost = SearchIndex(Location(str(tmp_path))).table.get_fragments()[0].data_files()[0].path
    (tmp_path / table.NAME / "data" / lost).unlink()
    with pytest.raises(
        DataError, match=r"passages\.lance: a part of the index is missing \(.*Run `heliostat search index` again"
    ):
        SearchIndex(Location(str(tmp_path))).search(["line"], "bm25", 50)
    assert index(corpus, tmp_path)["new"] == 1 and rows(tmp_path) == was


def test_a_folder_of_another_index_is_refused_before_ray_starts(corpus, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"not empty, and has no index of documents"):
        build.index_documents(str(corpus.location), str(tmp_path / "x"), SETTINGS)
    build.claim(
        Location(str(tmp_path / "y")), {"embedder": None, **IndexSettings().model_dump()}, "an index", "index of documents"
    )
    with pytest.raises(ConfigError, match="contains an index of another chunk_tokens"):
        build.index_documents(str(corpus.location), str(tmp_path / "y"), SETTINGS)


def test_of_two_commands_that_build_one_index_the_second_is_refused(corpus, tmp_path):
    """The error is one line, before Ray starts. The first command's files stay untouched, and the folder is free when it has
    ended."""
    place = tmp_path / "index"
    claimed = {"embedder": None, **SETTINGS.model_dump()}
    build.claim(Location(str(place)), claimed, "an index", "index of documents")
    with lease.take(Location(str(place)), "built"), pytest.raises(ConfigError, match=r"--out: .* is being built by process \d+"):
        build.index_documents(str(corpus.location), str(place), SETTINGS)
    assert index(corpus, place)["passages"] > 0


def test_an_index_that_another_command_has_taken_over_is_not_written(corpus, tmp_path):
    def taken() -> None:
        raise LeaseError("taken over")

    place = Location(str(tmp_path / "index"))
    flow = HereFlow(Work(place.join(WORK)))
    with pytest.raises(LeaseError):
        build.build(flow, corpus, place, SETTINGS, None, None, 4, taken)
    assert not place.join(table.RECORD).exists()
