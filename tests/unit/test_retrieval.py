"""Tests retrieval: results equal those of an exact search and name their places, and answers have sources."""

import asyncio
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from heliostat.apps.search import answering, judging, tasks
from heliostat.apps.search.search import SearchIndex, fuse
from heliostat.apps.search.table import RECORD
from heliostat.apps.search.tasks import IndexSettings
from heliostat.apps.serve.asks import Search
from heliostat.apps.serve.shelf import Shelf
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location
from heliostat.web.refusals import Refusal

from tests.unit.build_document_index import CORPUS, index, named, rows, write_dataset
from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model
from tests.unit.command_line import run
from tests.unit.test_samples import TEXTS


def bm25(texts: list[list[str]], question: list[str]) -> list[float]:
    """Computes Okapi BM25 by its formula, with k1 1.2 and b 0.75."""
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
    """Documents have one passage each, in two shards. Scores follow the formula over both."""
    draw = np.random.default_rng(0)
    words = ["kva", "zor", "mip", "tul", "ned", "pog"]
    texts = [" ".join(draw.choice(words, draw.integers(3, 9))) for _ in range(30)]
    index(write_dataset(tmp_path / "data", named(texts)), tmp_path / "index", settings=IndexSettings(chunk_tokens=64))
    (found,) = SearchIndex(Location(str(tmp_path / "index"))).search(["zor ned"], "bm25", 100)
    exact = bm25([text.split() for text in texts], ["zor", "ned"])
    assert len(found) == sum(score > 0 for score in exact)
    for passage in found:
        assert passage["score"] == pytest.approx(exact[int(passage["document"].partition("#")[2])], rel=0.03)


def test_the_nearest_are_those_of_an_exact_search(document_index):
    """A passage's own text finds it. The order and scores follow the cosine similarities of all embeddings."""
    everything = rows(document_index)
    for wanted in everything[:5]:
        found = document_index.search([wanted["text"]], "dense", 10)[0]
        cosines = sorted((float(np.dot(wanted["embedding"], row["embedding"])) for row in everything), reverse=True)
        np.testing.assert_allclose([passage["score"] for passage in found], cosines[:10], atol=1e-4)
        assert wanted["text"] in {passage["text"] for passage in found if passage["score"] > 0.9999}


def test_questions_that_come_together_are_embedded_one_after_another(document_index, monkeypatch):
    """If one thread sets a tokenizer's truncation, another thread's text would be truncated, or raise an error."""
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
        found = list(threads.map(lambda i: document_index.search([f"f{i % 4}"], "dense", 2), range(12)))
    assert max(most) == 1 and len(most) == 12 and found[:4] == found[4:8] == found[8:]


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_a_question_that_is_longer_than_the_embedder_takes_is_refused(document_index, mode):
    """It isn't answered by its beginning. A search by words alone uses all of it."""
    question = "line " * 100
    with pytest.raises(ConfigError, match=r"question: 'line line .* more than 64 tokens"):
        document_index.search(["f1", question], mode, 3)
    assert document_index.search([question], "bm25", 3)[0]


def test_fusion_adds_reciprocal_ranks():
    """The first result of both lists comes before the first of one list. Results of only one list come after those of both."""
    a, b, c, d = ({"shard": "s", "document": name, "number": 0, "score": 9} for name in "abcd")
    found = fuse([[a, b, c], [d, b, a]])
    assert [one["document"] for one in found] == ["a", "b", "d", "c"]
    assert found[0]["score"] == pytest.approx(1 / 61 + 1 / 63)


def test_an_index_without_embeddings_says_so(corpus, tmp_path):
    index(corpus, tmp_path)
    found = SearchIndex(Location(str(tmp_path)))
    assert found.modes == ("bm25",)
    with pytest.raises(ConfigError, match=r"--mode hybrid: .* has no embeddings"):
        found.search(["x"], "hybrid", 3)


def test_another_embedder_is_refused(document_index, embedder, tmp_path):
    other = write_model(tmp_path, {**BASE["model"], "intermediate_size": 32}, 64)
    with pytest.raises(ConfigError, match="isn't the model"):
        SearchIndex(document_index.place, other).search(["x"], "dense", 3)
    with pytest.raises(ConfigError, match=r"doesn't exist\. Pass the folder of the embedder that built"):
        SearchIndex(document_index.place, tmp_path / "none").search(["x"], "dense", 3)


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
    with pytest.raises(ConfigError, match="without any passage, but the model has room for 3"):
        answering.prompt("why?", passages, 3, count)


def test_measures_are_those_of_their_definitions():
    passages = [{"document": name} for name in ("a", "b", "a", "c", "d")]
    assert judging.ranks(passages, {"c", "x"}) == [3]
    found = judging.measures([3], 2)
    assert (found["recall@1"], found["recall@5"], found["mrr"]) == (0, 0.5, pytest.approx(1 / 3))
    assert found["ndcg@10"] == pytest.approx(0.5 / (1 + 1 / math.log2(3)))
    assert judging.measures([1], 1) == dict.fromkeys(judging.MEASURES, 1.0)
    assert judging.measures([], 1) == dict.fromkeys(judging.MEASURES, 0.0)


def test_an_index_is_judged_by_questions_of_known_documents(document_index):
    asked = [(text, {id}) for id, text in list(CORPUS.items())[:12]] + [
        ("line " * 100, {"code.jsonl#30"}),
        ("nothing", {"none#1"}),
    ]
    told = judging.judge(document_index, asked)
    assert (told["questions"], told["unknown"], told["too_long"]) == (12, 1, 1)
    with pytest.raises(ConfigError, match="has none of the documents that the questions name"):
        judging.judge(document_index, asked[-1:])
    with pytest.raises(ConfigError, match="all questions are too long for the embedder"):
        judging.judge(document_index, asked[-2:])
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
    with pytest.raises(ConfigError, match="line 2: expected"):
        judging.questions(tmp_path / "q.jsonl")


def test_a_question_goes_to_the_end_of_its_line_whatever_is_in_it(tmp_path):
    rows = [{"question": "one\u2028two\x85three", "document": "a"}, {"question": "four", "document": ["b", "c"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), newline="")
    assert judging.questions(tmp_path / "q.jsonl") == [(rows[0]["question"], {"a"}), ("four", {"b", "c"})]


def test_the_command_shows_passages_with_their_sources(document_index, monkeypatch, capsys):
    code, text, _ = run(monkeypatch, capsys, "search", "ask", str(document_index.place), TEXTS[7], "--json")
    told = json.loads(text)
    best = told["passages"][0]
    assert code == 0 and told["mode"] == "bm25" and best["document"] == "code.jsonl#7" and len(told["passages"]) == 5
    assert {"shard", "row_group", "begin", "end", "digest", "score", "columns"} <= best.keys()
    code, text, _ = run(monkeypatch, capsys, "search", "ask", str(document_index.place), "long document", "--top", "2")
    assert code == 0 and text.count(", characters ") == 2 and "[2] code.jsonl#30" in text and "long document" in text
    code, text, _ = run(monkeypatch, capsys, "search", "ask", str(document_index.place), "xylophone")
    assert (code, text) == (0, "no passage has a word of the question\n")


def test_a_model_answers_from_the_passages_that_it_has_room_for(document_index, embedder, tmp_path, monkeypatch, capsys):
    """The answer uses some of five passages, and reports the number. A question that doesn't fit is an error."""
    model = write_model(tmp_path, BASE["model"], 256)
    ask = ["search", "ask", str(document_index.place), "the long document", "--model", str(model), "--max-tokens", "8"]
    told = json.loads(run(monkeypatch, capsys, *ask, "--json")[1])
    answer = told["answer"]
    assert 1 <= answer["passages_used"] < 5 == len(told["passages"]) and answer["prompt_tokens"] <= 248 and answer["tokens"] <= 8
    code, text, _ = run(monkeypatch, capsys, *ask)
    assert code == 0 and f"(from the first {answer['passages_used']} of 5 passages" in text and text.count("[5] ") == 1
    code, _, said = run(
        monkeypatch, capsys, "ask", str(document_index.place), "f7", "--model", str(embedder), "--max-tokens", "8"
    )
    assert code == 2 and "question: the prompt has" in said and "the model has room for 56" in said
    code, _, said = run(
        monkeypatch, capsys, "ask", str(document_index.place), "f7", "--model", str(embedder), "--max-tokens", "64"
    )
    assert code == 2 and "max_tokens: 64 leaves no room for a prompt" in said and "Pass --max-tokens below 64" in said
    with pytest.raises(Refusal, match=r"leaves no room for the question\. Lower max_tokens by at least 89") as refused:
        asyncio.run(Shelf(str(document_index.place), str(embedder)).prompt(Search("f7", 1), -88, len))
    assert (refused.value.status, refused.value.param) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{index}"], "QUESTION: the command needs one question. Pass exactly one of a question and --questions FILE"),
        (["{index}", " "], "QUESTION: is empty. Write a question"),
        (["{index}", "a \udcff"], "QUESTION: isn't valid UTF-8 ('a \\udcff')"),
        (["{index}", "x", "--mode", "psychic"], "--mode: unknown mode (psychic). Use bm25, dense, hybrid"),
        (["{index}/none", "x"], "no index here"),
        (["{index}", "--questions", "/none"], "--questions: can't read /none"),
        (["{index}", "--questions", "/none", "--mode", "bm25"], "--mode: not with --questions"),
    ],
)
def test_bad_input_is_one_clear_line(document_index, monkeypatch, capsys, words, told):
    code, _, said = run(monkeypatch, capsys, "search", "ask", *(word.format(index=document_index.place) for word in words))
    assert code == 2 and told in said and len(said.strip().splitlines()) == 1


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        SearchIndex(Location(str(tmp_path)))
