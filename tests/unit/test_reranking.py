"""Tests reranking: a pair's score is the model's own and decides the order, and a folder that isn't a cross-encoder is rejected
at once."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from heliostat.apps.search import judging, reranking
from heliostat.apps.search.reranking import Reranker
from heliostat.apps.search.search import SearchIndex
from heliostat.apps.serve.asks import Search
from heliostat.apps.serve.served import served
from heliostat.apps.serve.shelf import Shelf
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from tokenizers import Tokenizer, processors
from transformers import BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from tests.unit.build_document_index import CORPUS, index, write_dataset
from tests.unit.build_model import make_model, texts
from tests.unit.command_line import run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reranker")
    make_model(folder, ("relevant",))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    index(write_dataset(folder / "data", CORPUS), folder / "index")
    return folder / "index"


def passages(given: list[str]) -> list[dict]:
    return [{"shard": "s", "document": f"d{i:03}", "number": 0, "text": text, "score": 0.0} for i, text in enumerate(given)]


def test_scores_are_the_models_own_whatever_stands_beside_a_pair(model):
    """The scores use the token types of both texts. If a pair is too long, only the passage is truncated. The order follows the
    score."""
    question, given = "what is it", texts(40)
    found = Reranker(model).order(question, passages(given))
    whole = BertForSequenceClassification.from_pretrained(model).eval()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(128, strategy="only_second")
    assert sorted(p["text"] for p in found) == sorted(given)
    assert [p["rerank_score"] for p in found] == sorted((p["rerank_score"] for p in found), reverse=True)
    for passage in found:
        one = tokenizer.encode(question, passage["text"])
        assert passage["rerank_cut"] == (len(question) + len(passage["text"]) + 3 > 128)
        given_types = {"input_ids": torch.tensor([one.ids]), "token_type_ids": torch.tensor([one.type_ids])}
        with torch.inference_mode():
            assert passage["rerank_score"] == pytest.approx(whole(**given_types).logits.item(), abs=2e-5)
    assert {p["rerank_cut"] for p in found} == {True, False} and len({p["rerank_score"] for p in found}) > 30
    assert Reranker(model).order(question, passages(given)[::-1]) == found


def test_positions_that_begin_behind_the_padding_are_not_counted_as_room(model, tmp_path):
    """For RoBERTa, these are the first two of 66. A pair of 64 tokens is the longest, and a longer pair is truncated without an
    error."""
    config = RobertaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                           max_position_embeddings=66, num_labels=1, pad_token_id=1, type_vocab_size=1)  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reranker = Reranker(tmp_path)
    assert reranker.pairs.max_tokens == 64
    found = reranker.order("abc", passages(["x" * 57, "x" * 58]))
    assert {p["document"]: p["rerank_cut"] for p in found} == {"d000": False, "d001": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 32}))
    assert Reranker(tmp_path).pairs.max_tokens == 32
    with pytest.raises(ConfigError, match=r"question: has \d+ tokens, but the reranker reads at most 32"):
        Reranker(tmp_path).order("y" * 40, passages(["x"]))


def unlike(model: Path, folder: Path, **changed: object) -> Path:
    """Copies the model, with other values in config.json."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | changed))
    return folder


def test_a_folder_without_a_cross_encoder_is_one_clear_error_before_a_weight_is_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(reranking, "Pairs", None)  # what reads weights
    make_model(tmp_path / "many", ("no", "maybe", "yes"))
    for folder, said in (
        (tmp_path / "many", r"has 3 labels \(no, maybe, yes\)\. Use a cross-encoder, which has one"),
        (unlike(model, tmp_path / "plain", architectures=["BertModel"]), "contains BertModel, which has no scoring head"),
        (unlike(model, tmp_path / "unnamed", architectures=None), "a model whose config.json has no architectures"),
        (unlike(model, tmp_path / "code", auto_map={"AutoModel": "x.py"}), "needs its own code"),
    ):
        with pytest.raises(ConfigError, match=f"^--reranker: .*{said}"):
            Reranker(folder)
    for name, said in (("tokenizer.json", "has no tokenizer.json"), ("model.safetensors", "has no safetensors")):
        folder = unlike(model, tmp_path / name.partition(".")[0])
        (folder / name).rename(folder / f"pytorch_{name}")
        (folder / "pytorch_model.bin").write_bytes(b"")
        if name.startswith("model"):
            (folder / "pytorch_model.safetensors").unlink()
        with pytest.raises(ConfigError, match=f"^--reranker: .*{said}"):
            Reranker(folder)


def test_a_head_that_was_never_trained_is_refused(model, tmp_path):
    """Its weights aren't in the folder. transformers would draw random weights, and the order would be random."""
    BertForSequenceClassification.from_pretrained(model).bert.save_pretrained(tmp_path / "bare")
    folder = unlike(model, tmp_path / "headless")
    shutil.copy(tmp_path / "bare" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^--reranker: .*2 of the model's weights are missing, for example classifier"):
        Reranker(folder)


def test_a_question_finds_its_passages_in_the_rerankers_order(model, place, monkeypatch, capsys):
    """It shows the best of the first fifty passages, not only of those that are shown, and each names its score."""
    ask = ["search", "ask", str(place), "line long document", "--top", "3"]
    code, text, _ = run(monkeypatch, capsys, *ask, "--reranker", str(model), "--json")
    told = json.loads(text)
    opened = SearchIndex(Location(str(place)))
    (found,) = opened.search(["line long document"], "bm25", reranking.CANDIDATES)
    wanted = Reranker(model).order("line long document", found)[:3]
    assert code == 0 and len(found) > 20
    assert [(p["document"], p["number"], p["rerank_score"]) for p in told["passages"]] == [
        (p["document"], p["number"], p["rerank_score"]) for p in wanted
    ]
    assert told["passages"] != json.loads(run(monkeypatch, capsys, *ask, "--json")[1])["passages"]
    assert {p["scored_by"] for p in told["passages"]} == {"bm25"}
    assert told["reranker"]["folder"] == str(model) and len(told["reranker"]["digest"]) == 64
    text = run(monkeypatch, capsys, *ask, "--reranker", str(model))[1]
    assert f"    rerank score {wanted[0]['rerank_score']:.4g}, bm25 score " in text
    code, _, said = run(monkeypatch, capsys, *ask, "--reranker", str(place))
    assert code == 2 and "is a folder without a model (no config.json)" in said


def test_an_index_is_judged_with_and_without_the_reranker(model, place, monkeypatch, capsys, tmp_path):
    """The comparison uses the same passages in the other order, against BM25 and against the mode itself."""
    asked = [(text, {id}) for id, text in list(CORPUS.items())[:8]]
    opened, reranker = SearchIndex(Location(str(place))), Reranker(model)
    told = judging.judge(opened, asked, reranker)
    assert (
        told["modes"].keys() == {"bm25", "bm25+reranker"}
        and told["modes"]["bm25"] == judging.judge(opened, asked)["modes"]["bm25"]
    )
    values = []
    for question, right in asked:
        (found,) = opened.search([question], "bm25", 100)
        ordered = reranker.order(question, found[: reranking.CANDIDATES]) + found[reranking.CANDIDATES :]
        values.append(judging.measures(judging.ranks(ordered, right), 1)["mrr"])
    assert told["modes"]["bm25+reranker"]["mrr"] == pytest.approx(sum(values) / len(values))
    gain = told["modes"]["bm25+reranker"]["mrr"] - told["modes"]["bm25"]["mrr"]
    assert told["reranked"]["bm25"]["mrr"][0] == pytest.approx(gain) == told["over_bm25"]["bm25+reranker"]["mrr"][0]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q, "document": min(d)}) + "\n" for q, d in asked))
    words = ["search", "ask", str(place), "--questions", str(tmp_path / "q.jsonl"), "--reranker", str(model)]
    text = run(monkeypatch, capsys, *words)[1]
    assert "bm25+reranker over bm25" in text and "8 questions" in text


def test_the_endpoint_finds_passages_in_the_same_order_and_says_at_once_what_is_wrong(model, place, tmp_path):
    found = asyncio.run(Shelf(str(place), None, str(model)).search(Search("line long document", 4)))
    wanted = reranking.best(SearchIndex(Location(str(place))), Reranker(model), "line long document", "bm25", 4)
    assert [{**p, "columns": {}} for p in wanted] == found and "rerank_score" in found[0]
    make_model(tmp_path / "many", ("no", "yes"))
    with pytest.raises(ConfigError, match=r"--reranker: .* has 2 labels"):
        served(None, "", None, str(place), None, tmp_path / "many").kind()
    with pytest.raises(ConfigError, match="--reranker: needs --index"):
        served("m", "", None, None, None, model)
