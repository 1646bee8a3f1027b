"""Retrieval: passages are their documents, a version of an index is the dataset's documents and no others, and what is found says
where it lies."""

import asyncio
import json
import math
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from heliostat import lease
from heliostat.config.schema import validate
from heliostat.curation.work import Work
from heliostat.data import manifest
from heliostat.errors import ConfigError, DataError, LeaseError
from heliostat.pipelines.text import tokens
from heliostat.retrieval import answering, build, judging, table, tasks, units
from heliostat.retrieval.cutting import cut
from heliostat.retrieval.record import RECORD
from heliostat.retrieval.search import Index, fuse
from heliostat.retrieval.settings import Settings
from heliostat.serving.asks import Search
from heliostat.serving.refusals import Refusal
from heliostat.serving.shelf import Shelf
from heliostat.storage import Location

from tests.unit.build_curation import HereFlow, KilledError
from tests.unit.build_job import BASE
from tests.unit.build_pipeline import Here, make_dataset
from tests.unit.command_line import run
from tests.unit.test_batch_inference import write_model
from tests.unit.test_samples import END, TEXTS

SETTINGS = Settings(chunk_tokens=16, overlap=4)


# cutting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 7, 16, 1000])
@pytest.mark.parametrize("lines", [0, 1, 9])
def test_passages_are_all_of_a_text_within_their_size_and_overlap(size, lines):
    """A token for each character, and a line of so many; the last quarter of a passage decides whether it ends with a line."""
    text = "".join("\n" if lines and i % lines == lines - 1 else chr(97 + i % 26) for i in range(103))
    places = cut(text, range(len(text)), size, size // 4)
    assert places[0][0] == 0 and places[-1][1] == len(text) and all(0 < b - a <= size for a, b in places)
    for (a, b), (c, _) in pairwise(places):
        assert a < c <= b and b - c <= size // 4
        near = text[a + size * 3 // 4 : a + size]
        assert "\n" not in near or text[b - 1] == "\n"


def test_a_character_of_several_tokens_is_in_one_passage_whole():
    """Its tokens begin at one place."""
    text = "aébéc"
    places = cut(text, [0, 1, 1, 2, 3, 3, 4], 2, 0)
    assert "".join(text[a:b] for a, b in places) == text


def test_no_text_has_no_passage():
    assert cut("", [], 16, 4) == []


@pytest.mark.parametrize(("asked", "told"), [({"overlap": 200}, "more than half"), ({"chunk_tokens": 3}, "chunk_tokens")])
def test_settings_that_go_nowhere_are_refused(asked, told):
    with pytest.raises(ConfigError, match=told):
        validate(Settings, asked, "index-documents")


# an index ------------------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, texts: dict[str, str], shards: int = 2, definition: str | None = None) -> manifest.Manifest:
    """A dataset as the pipeline makes one, in shards of several row groups whose places are known."""
    definition = definition or tokens.train(TEXTS, 300, END)
    tokenizer = tokens.load(definition)
    end, place, rows = tokens.end_id(tokenizer, END), Location(str(folder)), []
    place.join("tokenizer.json").write(definition.encode())
    for number in range(shards):
        ids = [id for id in texts if int(id.partition("#")[2]) % shards == number]
        encoded = tokens.encode(tokenizer, [texts[id] for id in ids], end)
        data = tokens.shard(ids, encoded, 60, np.arange(len(ids), 0, -1) * 1000 + number)
        path = f"shards/{number:05}/{hash(data) & 0xFFFFFFFF:08x}.parquet"
        place.join(path).write(data)
        rows += manifest.read_footer(place, path, "tokens")
    return manifest.write(place, rows, {"kind": "tokens", "end_of_document": end, "vocab_size": 300})


def named(texts: list[str]) -> dict[str, str]:
    return {f"code.jsonl#{i}": text for i, text in enumerate(texts)}


LONG = "".join(f"line {i} of a long document\n" for i in range(40))
CORPUS = named([*TEXTS[:30], LONG, *TEXTS[30:60], "  \n "])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("corpus"), CORPUS)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("embedder"), BASE["model"], 64)


def index(made: manifest.Manifest, out: Path, embedder: Path | None = None, settings=SETTINGS, **flow) -> dict:
    place, about = Location(str(out)), build.describe(embedder) if embedder else None
    return build.build(HereFlow(Work(place.join(build.WORK)), **flow), made, place, settings, about, build.what_was(place), 4)


@pytest.fixture(scope="module")
def made(corpus, embedder, tmp_path_factory):
    out = tmp_path_factory.mktemp("index")
    index(corpus, out, embedder)
    return Index(Location(str(out)))


def rows(out: Path | Index) -> list[dict]:
    """All passages of the version that an index's record names, in an order of their own."""
    found = (out if isinstance(out, Index) else Index(Location(str(out)))).table.to_table().to_pylist()
    return sorted(found, key=lambda row: (row["document"], row["number"]))


def test_each_passage_is_the_text_of_its_place(made, corpus):
    """Read back from the shard that it names, by another way than it was made: the document is there, and is what was given."""
    found = rows(made)
    assert {row["document"] for row in found} == {id for id, text in CORPUS.items() if text.strip()}
    assert made.record["documents"] == len(CORPUS) and made.record["empty"] == 1 and made.record["passages"] == len(found)
    for row in found:
        text = CORPUS[row["document"]]
        assert row["text"] == text[row["begin"] : row["end"]] and len(row["digest"]) == 32
    long = [row for row in found if CORPUS[row["document"]] is LONG]
    assert long[0]["begin"] == 0 and long[-1]["end"] == len(LONG) and [row["number"] for row in long] == list(range(len(long)))
    assert len(set(corpus.paths)) == 2 and {row["shard"] for row in found} == set(corpus.paths)


def test_documents_that_are_rearranged_for_a_middle_are_indexed_as_their_texts(tmp_path):
    """Though one is several spans, in several rows: its passages have the places and numbers of one document."""
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
    """Down to single row groups, whose documents are whole."""
    for target in (1, 500, 1 << 20):
        listed = list(units.units(corpus, target))
        groups = [(unit.path, group.number) for unit in listed for group in unit.groups]
        assert groups == list(zip(corpus.paths, corpus.chunks["row_group"].to_pylist(), strict=True))
        found = [one for unit in listed for one in units.documents(corpus.location, unit, corpus.meta["end_of_document"])]
        assert Counter(one.id for one in found) == Counter(list(CORPUS))
    assert len(list(units.units(corpus, 1))) > 10


def test_a_run_that_is_killed_goes_on_and_lists_each_passage_once(corpus, tmp_path, monkeypatch):
    """Killed after each task: the passages are those of an undisturbed run; nothing is found before the record is there."""
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
                Index(Location(str(tmp_path / "out")))
    assert broken > 2 and told["new"] <= 2
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_a_new_version_of_the_dataset_is_only_its_own_work(corpus, made, embedder, tmp_path):
    """Of its documents some are new, some gone, one has another text: counted; what was embedded is not embedded again, and
    the index is what it would be if it were made at once."""
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
    found = Index(Location(str(tmp_path / "index"))).search([TEXTS[3]], "bm25", 50)[0]
    assert found and all(passage["document"] != "code.jsonl#3" for passage in found)
    assert found == Index(Location(str(tmp_path / "fresh"))).search([TEXTS[3]], "bm25", 50)[0]


def test_passages_that_are_cut_are_counted_also_where_their_embeddings_are_known(embedder, tmp_path):
    """Each passage, as the command says, though texts that are the same are embedded once."""
    long = "x(0) " * 90
    texts = named([long, "def f(): pass", long, "def g(): pass"])
    whole = Settings(chunk_tokens=512, overlap=4)
    first = index(write_dataset(tmp_path / "data", texts, 1), tmp_path / "index", embedder, whole)
    later = write_dataset(tmp_path / "later", {**texts, "code.jsonl#4": "def h(): pass"}, 1)
    second = index(later, tmp_path / "index", embedder, whole)
    assert (first["truncated"], first["embedded"]) == (2, 3)
    assert (second["truncated"], second["embedded"]) == (2, 1)


def test_versions_that_were_replaced_long_ago_go_and_nothing_that_is_needed(corpus, tmp_path, monkeypatch):
    """The newest version shares fragments with the one before: without a document it is whole, and so is a later one."""
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
    """Also if its record was written long before; then it goes, and the endpoint says so."""

    def brought_up_to_date(text: str) -> Index:
        lines = [{"text": text, "url": f"http://h/{text}"}, {"text": "another document", "url": "http://h/x"}]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        keys = {"name": "t", "input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "data"), "columns": ["url"]}
        made = make_dataset(Here(**keys, stages=[{"stage": "length", "min_chars": 2}], tokenizer={"vocab_size": 300}))
        index(made, tmp_path / "index")
        return Index(Location(str(tmp_path / "index")))

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
    with pytest.raises(Refusal, match="start the endpoint anew") as refused:
        asyncio.run(shelf.search(Search("older", 1)))
    assert refused.value.status == 503


def test_fragments_that_were_lost_are_made_again(corpus, tmp_path):
    index(corpus, tmp_path)
    was = rows(tmp_path)
    lost = Index(Location(str(tmp_path))).table.get_fragments()[0].data_files()[0].path
    (tmp_path / table.NAME / "data" / lost).unlink()
    with pytest.raises(DataError, match="a part of it is missing"):
        Index(Location(str(tmp_path))).search(["line"], "bm25", 50)
    assert index(corpus, tmp_path)["new"] == 1 and rows(tmp_path) == was


# asking --------------------------------------------------------------------------------------------------------------


def bm25(texts: list[list[str]], question: list[str]) -> list[float]:
    """Okapi BM25 by its formula, with k1 1.2 and b 0.75."""
    mean, scores = sum(map(len, texts)) / len(texts), []
    for words in texts:
        score = 0.0
        for word in question:
            holding = sum(word in other for other in texts)
            often = words.count(word)
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            score += idf * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * len(words) / mean))
        scores.append(score)
    return scores


def test_words_are_scored_by_bm25_over_all_fragments(tmp_path):
    """Documents of one passage each, in two shards: scores are those of the formula over both."""
    draw = np.random.default_rng(0)
    words = ["kva", "zor", "mip", "tul", "ned", "pog"]
    texts = [" ".join(draw.choice(words, draw.integers(3, 9))) for _ in range(30)]
    index(write_dataset(tmp_path / "data", named(texts)), tmp_path / "index", settings=Settings(chunk_tokens=64))
    (found,) = Index(Location(str(tmp_path / "index"))).search(["zor ned"], "bm25", 100)
    exact = bm25([text.split() for text in texts], ["zor", "ned"])
    assert len(found) == sum(score > 0 for score in exact)
    for passage in found:
        assert passage["score"] == pytest.approx(exact[int(passage["document"].partition("#")[2])], rel=0.03)


def test_the_nearest_are_those_of_an_exact_search(made):
    """A passage's own text finds it; the order and scores are those of the cosines of all embeddings."""
    everything = rows(made)
    for wanted in everything[:5]:
        found = made.search([wanted["text"]], "dense", 10)[0]
        cosines = sorted((float(np.dot(wanted["embedding"], row["embedding"])) for row in everything), reverse=True)
        np.testing.assert_allclose([passage["score"] for passage in found], cosines[:10], atol=1e-4)
        assert wanted["text"] in {passage["text"] for passage in found if passage["score"] > 0.9999}


def test_questions_that_come_together_are_embedded_one_after_another(made, monkeypatch):
    """A tokenizer that one thread has told where to truncate would truncate the other's text, or raise."""
    inside, most, embed = [], [], tasks.embed

    def watched(*given):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        found = embed(*given)
        inside.pop()
        return found

    monkeypatch.setattr(tasks, "embed", watched)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: made.search([f"f{i % 4}"], "dense", 2), range(12)))
    assert max(most) == 1 and len(most) == 12 and found[:4] == found[4:8] == found[8:]


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_a_question_that_is_longer_than_the_embedder_takes_is_refused(made, mode):
    """And not answered by its beginning; words alone find by all of it."""
    question = "line " * 100
    with pytest.raises(ConfigError, match=r"question: 'line line .* more tokens than the 64 that the embedder takes"):
        made.search(["f1", question], mode, 3)
    assert made.search([question], "bm25", 3)[0]


def test_fusion_adds_reciprocal_ranks():
    """First in both lists beats first in one; what one list has alone comes behind what both have."""
    a, b, c, d = ({"shard": "s", "document": name, "number": 0, "score": 9} for name in "abcd")
    found = fuse([[a, b, c], [d, b, a]])
    assert [one["document"] for one in found] == ["a", "b", "d", "c"]
    assert found[0]["score"] == pytest.approx(1 / 61 + 1 / 63)


def test_an_index_without_embeddings_says_so(corpus, tmp_path):
    index(corpus, tmp_path)
    found = Index(Location(str(tmp_path)))
    assert found.modes == ("bm25",)
    with pytest.raises(ConfigError, match=r"--mode hybrid: .* has no embeddings"):
        found.search(["x"], "hybrid", 3)


def test_another_embedder_is_refused(made, embedder, tmp_path):
    other = write_model(tmp_path, {**BASE["model"], "intermediate_size": 32}, 64)
    with pytest.raises(ConfigError, match="is not the model"):
        Index(made.place, other).search(["x"], "dense", 3)
    with pytest.raises(ConfigError, match="is not there; name its folder"):
        Index(made.place, tmp_path / "none").search(["x"], "dense", 3)


def test_a_prompt_has_as_many_passages_as_there_is_room_for():
    passages = [{"document": f"d{i}", "text": "word " * 10} for i in range(4)]
    count = lambda text: len(text.split())  # noqa: E731
    whole = answering.prompt("why?", passages, None, count)
    assert (whole.used, whole.cut, whole.text.count("word")) == (4, False, 40) and whole.text.endswith("Question: why?\nAnswer:")
    some = answering.prompt("why?", passages, whole.tokens - 1, count)
    assert (some.used, some.cut) == (3, False) and some.tokens <= whole.tokens - 1
    bare = answering.prompt("why?", [], None, count).tokens
    part = answering.prompt("why?", passages, bare + 7, count)
    assert (part.used, part.cut) == (1, True) and 0 < part.text.count("word") < 10 and part.tokens <= bare + 7
    with pytest.raises(ConfigError, match="without any passage, and the model has room for 3"):
        answering.prompt("why?", passages, 3, count)


# judging -------------------------------------------------------------------------------------------------------------


def test_measures_are_those_of_their_definitions():
    passages = [{"document": name} for name in ("a", "b", "a", "c", "d")]
    assert judging.ranks(passages, {"c", "x"}) == [3]
    found = judging.measures([3], 2)
    assert (found["recall@1"], found["recall@5"], found["mrr"]) == (0, 0.5, pytest.approx(1 / 3))
    assert found["ndcg@10"] == pytest.approx(0.5 / (1 + 1 / math.log2(3)))
    assert judging.measures([1], 1) == dict.fromkeys(judging.MEASURES, 1.0)
    assert judging.measures([], 1) == dict.fromkeys(judging.MEASURES, 0.0)


def test_an_index_is_judged_by_questions_of_known_documents(made):
    asked = [(text, {id}) for id, text in list(CORPUS.items())[:12]] + [
        ("line " * 100, {"code.jsonl#30"}),
        ("nothing", {"none#1"}),
    ]
    told = judging.judge(made, asked)
    assert (told["questions"], told["unknown"], told["too_long"]) == (12, 1, 1)
    with pytest.raises(ConfigError, match="holds no document that a question names"):
        judging.judge(made, asked[-1:])
    with pytest.raises(ConfigError, match="each is longer than the embedder"):
        judging.judge(made, asked[-2:])
    assert told["modes"]["bm25"]["recall@10"] == 1 and told["modes"].keys() == {"bm25", "dense", "hybrid"}
    for mode, over in told["over_bm25"].items():
        assert over["mrr"][0] == pytest.approx(told["modes"][mode]["mrr"] - told["modes"]["bm25"]["mrr"])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"question": "a"}',
        '{"question": "\\ud800", "document": "a"}',
        '{"question": " ", "document": "a"}',
        '{"question": "a", "document": [1]}',
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    (tmp_path / "q.jsonl").write_text('{"question": "a", "document": "b"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2: is not"):
        judging.questions(tmp_path / "q.jsonl")


# the commands --------------------------------------------------------------------------------------------------------


def test_the_command_shows_passages_with_their_sources(made, monkeypatch, capsys):
    code, text, _ = run(monkeypatch, capsys, "ask", str(made.place), TEXTS[7], "--json")
    told = json.loads(text)
    best = told["passages"][0]
    assert code == 0 and told["mode"] == "bm25" and best["document"] == "code.jsonl#7" and len(told["passages"]) == 5
    assert {"shard", "row_group", "begin", "end", "digest", "score", "columns"} <= best.keys()
    code, text, _ = run(monkeypatch, capsys, "ask", str(made.place), "long document", "--top", "2")
    assert code == 0 and text.count(", characters ") == 2 and "[2] code.jsonl#30" in text and "long document" in text
    code, text, _ = run(monkeypatch, capsys, "ask", str(made.place), "xylophone")
    assert (code, text) == (0, "no passage has a word of the question\n")


def test_a_model_answers_from_the_passages_that_it_has_room_for(made, embedder, tmp_path, monkeypatch, capsys):
    """Of five passages some, which is said; a question that has no room is an error."""
    model = write_model(tmp_path, BASE["model"], 256)
    ask = ["ask", str(made.place), "the long document", "--model", str(model), "--max-tokens", "8"]
    told = json.loads(run(monkeypatch, capsys, *ask, "--json")[1])
    answer = told["answer"]
    assert 1 <= answer["passages_used"] < 5 == len(told["passages"]) and answer["prompt_tokens"] <= 248 and answer["tokens"] <= 8
    code, text, _ = run(monkeypatch, capsys, *ask)
    assert code == 0 and f"(from the first {answer['passages_used']} of 5 passages" in text and text.count("[5] ") == 1
    code, _, said = run(monkeypatch, capsys, "ask", str(made.place), "f7", "--model", str(embedder), "--max-tokens", "8")
    assert code == 2 and "question: the prompt has" in said and "the model has room for 56" in said
    code, _, said = run(monkeypatch, capsys, "ask", str(made.place), "f7", "--model", str(embedder), "--max-tokens", "64")
    assert code == 2 and "max_tokens: 64 leave no room for a prompt" in said and "give --max-tokens below 64" in said
    with pytest.raises(Refusal, match="leaves no room for the question; ask for at least 89 fewer") as refused:
        asyncio.run(Shelf(str(made.place), str(embedder)).prompt(Search("f7", 1), -88, len))
    assert (refused.value.status, refused.value.param) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{index}"], "question: give either one question"),
        (["{index}", " "], "question: is empty"),
        (["{index}", "a \udcff"], "question: 'a \\udcff' is no text in UTF-8"),
        (["{index}", "x", "--mode", "psychic"], "--mode: 'psychic' is none of bm25, dense, hybrid"),
        (["{index}/none", "x"], "no index here"),
        (["{index}", "--questions", "/none"], "--questions: /none cannot be read"),
        (["{index}", "--questions", "/none", "--mode", "bm25"], "--mode: does not go with --questions"),
    ],
)
def test_bad_input_is_one_clear_line(made, monkeypatch, capsys, words, told):
    code, _, said = run(monkeypatch, capsys, "ask", *(word.format(index=made.place) for word in words))
    assert code == 2 and told in said and len(said.strip().splitlines()) == 1


def test_a_folder_of_another_index_is_refused_before_ray_starts(corpus, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty, and holds no index of documents"):
        build.index_documents(str(corpus.location), str(tmp_path / "x"), SETTINGS)
    build.claim(Location(str(tmp_path / "y")), {"embedder": None, **Settings().model_dump()}, "an index", "index of documents")
    with pytest.raises(ConfigError, match="holds an index of another chunk_tokens"):
        build.index_documents(str(corpus.location), str(tmp_path / "y"), SETTINGS)


def test_of_two_commands_that_build_one_index_the_second_is_refused(corpus, tmp_path):
    """In a line, before Ray starts; nothing of the first one's is touched, and once that has ended the folder is free."""
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
    flow = HereFlow(Work(place.join(build.WORK)))
    with pytest.raises(LeaseError):
        build.build(flow, corpus, place, SETTINGS, None, None, 4, taken)
    assert not place.join(build.RECORD).exists()


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Index(Location(str(tmp_path)))
