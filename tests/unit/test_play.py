"""Tests the parts of the page: the endpoint's own HTTP server in one process, a model that draws, and an index that answers with
sources."""

import asyncio
import base64
import io
import json
import shutil
import threading

import numpy as np
import openai
import pytest
import requests
import torch
from heliostat.apps.play import app
from heliostat.apps.play.app import play
from heliostat.apps.search import answering
from heliostat.apps.serve.asks import Holds, PictureRequest
from heliostat.apps.serve.replica import Painter, Replica
from heliostat.apps.serve.served import Options as Serving
from heliostat.apps.serve.served import served
from heliostat.apps.serve.shelf import Shelf
from heliostat.errors import ConfigError
from heliostat.inference.batch.engines import Embed, Input
from heliostat.recipes import exported
from heliostat.recipes.images.generator import ImageCanvas
from heliostat.recipes.images.generator import PictureOptions as Options
from heliostat.recipes.text import sentence_folder
from PIL import Image

from tests.unit import build_images
from tests.unit.build_document_index import CORPUS, index, write_dataset
from tests.unit.build_job import BASE, job
from tests.unit.build_language_model import write_model
from tests.unit.build_text_to_image import export, recipe, woken
from tests.unit.page import KEY, client, opened

BEARER = {"Authorization": f"Bearer {KEY}"}


def write_painter(folder, dataset):
    """Exports a model with random weights that draws 8 x 8 pixels."""
    made = recipe(dataset)
    torch.manual_seed(0)
    model = woken(made.build()).eval()
    export(made, model, folder)
    exported.write(folder, job(**build_images.job(dataset)), {"run_id": "f" * 32, "step": 1, "data_digest": "d"})
    return folder


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return write_painter(tmp_path_factory.mktemp("painter"), build_images.digits(folder / "data", 80))


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("writer"), BASE["model"], 512)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    index(write_dataset(folder / "data", CORPUS), folder / "code-index")
    return folder / "code-index"


@pytest.fixture(scope="module")
def drawing(painter):
    with opened(painter) as url:
        yield url


@pytest.fixture(scope="module")
def answering_from(writer, documents):
    with opened(writer, documents) as url:
        yield url


def pixels(drawn) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.b64_json))))


# pictures ------------------------------------------------------------------------------------------------------------


def test_pictures_follow_from_their_seeds_and_are_those_of_generate(painter, drawing):
    asked = {"model": painter.name, "prompt": "the digit two", "extra_body": {"seed": 7, "steps": 3, "guidance": 2.0}}
    made = client(drawing).images.generate(**asked, n=3)
    assert [drawn.seed for drawn in made.data] == [7, 8, 9] and made.output_format == "png"
    alone = client(drawing).images.generate(**{**asked, "extra_body": {**asked["extra_body"], "seed": 8}})
    own = ImageCanvas(painter).pictures(["the digit two"], [8], Options(steps=3, guidance=2.0))[0]
    assert pixels(made.data[0]).shape == (8, 8) and np.array_equal(pixels(alone.data[0]), own)
    assert np.abs(pixels(made.data[1]).astype(int) - own).max() <= 1 < np.abs(pixels(made.data[0]).astype(int) - own).max()
    wide = client(drawing).images.generate(**asked, size="16x8")
    assert pixels(wide.data[0]).shape == (8, 16)
    other = client(drawing).images.generate(**{**asked, "extra_body": {**asked["extra_body"], "sampler": "ddpm"}})
    again = client(drawing).images.generate(**asked)
    assert (
        np.array_equal(pixels(again.data[0]), pixels(made.data[0]))
        or np.abs(pixels(again.data[0]).astype(int) - pixels(made.data[0])).max() <= 1
    ), "a sampler that was asked for stays"
    assert not np.array_equal(pixels(other.data[0]), pixels(again.data[0]))


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"size": "big"}, "size", "pattern"),
        ({"size": "40x40"}, "size", "the model generates 8x8 pixels, and an image may have at most 4 times as many pixels"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"quality": "hd"}, "quality", "isn't supported"),
        ({"steps": 1001}, "steps", "less than or equal to 1000"),
        ({"sampler": "euler"}, None, "'euler' doesn't support a model with prediction"),
        ({"guidence": 3}, "guidence", "Did you mean 'guidance'?"),
    ],
)
def test_what_is_not_drawn_is_refused_by_name(painter, drawing, body, param, said):
    asked = {"model": painter.name, "prompt": "a", **body}
    answer = requests.post(f"{drawing}/v1/images/generations", json=asked, headers=BEARER, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and said in error["message"]


def test_a_model_that_draws_writes_nothing_and_the_other_way_round(painter, writer, drawing, answering_from):
    with pytest.raises(openai.BadRequestError, match=r"generates images\. Send the request to /v1/images/generations"):
        client(drawing).completions.create(model=painter.name, prompt="a")
    with pytest.raises(openai.BadRequestError, match="generates text"):
        client(answering_from).images.generate(model=writer.name, prompt="a")
    told = requests.get(f"{drawing}/abilities", headers=BEARER, timeout=60).json()
    assert told["tabs"] == ["draw"] and told["images"]["size"] == [8, 8]


# an index ------------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_as_the_command_does_it_with_its_sources(writer, answering_from):
    ask, question = client(answering_from), [{"role": "user", "content": "line 7 of a long document"}]
    assert [one.id for one in ask.models.list()] == [writer.name, "code-index"]
    made = ask.chat.completions.create(model="code-index", messages=question, max_tokens=9, extra_body={"top": 3})
    passages = [{key: value for key, value in source.items() if key != "used"} for source in made.sources]
    told = answering.answer(writer, question[0]["content"], passages, 9)
    assert made.choices[0].message.content.strip() == told["text"] and made.usage.prompt_tokens == told["prompt_tokens"]
    read = {"whole": told["passages_used"] - told["cut"], "part": int(told["cut"])}
    assert {how: [s["used"] for s in made.sources].count(how) for how in read} == read and len(passages) == 3
    for source in made.sources:
        assert source["text"] == CORPUS[source["document"]][source["begin"] : source["end"]]
    asked = {"model": "code-index", "messages": question, "max_tokens": 9, "stream": True}
    pieces = list(ask.chat.completions.create(**asked, extra_body={"top": 3}))
    assert pieces[0].sources == made.sources and not hasattr(pieces[1], "sources")
    assert "".join(piece.choices[0].delta.content for piece in pieces) == made.choices[0].message.content


def test_a_search_finds_passages_and_what_is_wrong_is_refused(writer, answering_from, documents):
    def post(path, **body):
        return requests.post(f"{answering_from}/v1/{path}", json=body, headers=BEARER, timeout=60)

    found = post("search", query="long document", top=2).json()
    assert found["model"] == "code-index" and len(found["data"]) == 2 and found["data"][0]["score"] >= found["data"][1]["score"]
    message = {"role": "user", "content": "line"}
    chat = {"model": "code-index", "messages": [message]}
    for path, body, status, said in [
        ("search", {"query": " "}, 400, "is empty"),
        ("search", {"query": "a", "top": 51}, 400, "less than or equal to 50"),
        ("search", {"query": "a", "mode": "dense"}, 400, "the index has no embeddings. Use bm25"),
        ("search", {"query": "a", "model": writer.name}, 400, "isn't the served index. Set model to 'code-index'"),
        ("chat/completions", {**chat, "messages": [message, message]}, 400, "at most 1 item"),
        ("chat/completions", {**chat, "messages": [{**message, "role": "system"}]}, 400, "expected exactly one message"),
        ("chat/completions", {**chat, "messages": [{**message, "content": "zzzzqqq"}]}, 404, "no passage of the index"),
        ("chat/completions", {**chat, "messages": [{**message, "content": "line " * 600}]}, 400, "without any passage"),
        ("chat/completions", {**chat, "model": writer.name, "top": 3}, 400, "top: unknown parameter"),
        ("completions", {"model": "code-index", "prompt": "a"}, 400, "is an index. Send the request to /v1/search"),
        ("completions", {"model": "gpt", "prompt": "a"}, 404, "'code-index'"),
    ]:
        answer = post(path, **body)
        assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), answer.text
    with opened(None, documents) as url:
        assert requests.post(f"{url}/v1/search", json={"query": "line"}, headers=BEARER, timeout=60).json()["data"]
        with pytest.raises(
            openai.BadRequestError,
            match=r"'code-index' is an index, and the endpoint has no model that .*\. Send the request to /v1/search",
        ):
            client(url).chat.completions.create(**chat)
        told = requests.get(f"{url}/abilities", headers=BEARER, timeout=60).json()
        assert told["tabs"] == ["ask"] and told["prompt"] is None and not told["passages"]["answers"]


# the page ------------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_key_holds_no_secret_and_names_no_other_host(answering_from):
    for name in ("", *(f"page/{name}" for name in app.FILES)):
        answer = requests.get(f"{answering_from}/{name}", timeout=60)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert KEY not in answer.text and "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    for path in ("page/..%2frun.py", "page/nothing.js"):
        assert requests.get(f"{answering_from}/{path}", timeout=60).status_code in (401, 404)


def test_nothing_is_told_without_the_key_or_under_another_name(answering_from):
    for path in ("abilities", "v1/models", "metrics"):
        assert requests.get(f"{answering_from}/{path}", timeout=60).status_code == 401
    for path in ("", "abilities"):
        answer = requests.get(f"{answering_from}/{path}", headers={**BEARER, "Host": "evil.example"}, timeout=60)
        assert answer.status_code == 400 and "tabs" not in answer.text
    with pytest.raises(openai.AuthenticationError):
        client(answering_from, "sk-a-key-of-nobody-here").models.list()
    told = requests.get(f"{answering_from}/abilities", headers=BEARER, timeout=60).json()
    assert told["tabs"] == ["write", "ask"]


def test_the_page_begins_with_a_prompt_of_the_models_record(tmp_path):
    folder = tmp_path / "artifacts" / "model"
    folder.mkdir(parents=True)
    assert app.example(folder) is None
    trained = {"name": "a", "model": {"samples": {"prompts": [{"text": "the digit two"}]}}, "data": {}, "train": {}}
    (folder / "heliostat.json").write_text(json.dumps({"recipe": "heliostat.recipes:TextToImage", "job": trained}))
    assert app.example(folder) == "the digit two"
    (tmp_path / "input_example.json").write_text('["def main"]')  # as MLflow writes it
    assert app.example(folder) == "def main"
    (tmp_path / "input_example.json").write_text("[]")
    assert app.example(folder) == "the digit two"
    (tmp_path / "input_example.json").write_text('{"columns": ["prompt"], "data": [["x"]]}')  # a table, of a recipe's own
    assert app.example(folder) == "the digit two"


def test_an_index_without_its_embedder_is_refused_at_the_start(writer, tmp_path):
    folder = shutil.copytree(writer, tmp_path / "embedder")
    place = tmp_path / "index"
    index(write_dataset(tmp_path / "data", CORPUS), place, folder)
    assert Shelf(str(place), None).index.modes == ("bm25", "dense", "hybrid")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"--embedder: .*embedder doesn't exist\. Pass the folder of the embedder that built"):
        Replica(Holds(None, 4, str(place)))
    assert Shelf(str(place), str(tmp_path / "elsewhere")).index.embedder == tmp_path / "elsewhere"


def test_an_embedder_is_asked_for_embeddings_alone_and_has_no_page(writer, tmp_path):
    """Its vector for a text equals that of batch inference."""
    folder = shutil.copytree(writer, tmp_path / "embedder")
    sentence_folder.write(folder, sentence_folder.Embedding("last", 16), 64)
    texts = ["def read(path):", "class Reader:", "x" * 400]
    found = Embed(folder, 4)([Input(text, 0) for text in texts[:2]])
    with opened(folder) as url:
        made = client(url).embeddings.create(model="embedder", input=texts[:2]).data
        for one, right in zip(made, found, strict=True):
            assert one.embedding == pytest.approx(right.values["embedding"].tolist(), abs=1e-6)
        with pytest.raises(openai.BadRequestError, match="the text has more than 16 tokens"):
            client(url).embeddings.create(model="embedder", input=texts[2:])
        with pytest.raises(openai.BadRequestError, match=r"embeds texts\. Send the request to /v1/embeddings"):
            client(url).completions.create(model="embedder", prompt="x")
    with pytest.raises(ConfigError, match="is an embedder, and the page doesn't support embedders"):
        play(served(str(folder), "sqlite:///x", None, None, None), lambda: pytest.fail("made keys"), Serving(), print)


def test_a_drawing_that_nobody_waits_for_any_more_ends_before_the_next_begins(painter):
    """Drawings share one pipeline."""
    drawing, open_, go_on = Painter(painter), list[int](), threading.Event()
    draw = drawing.canvas.draw

    def counted(*asked):
        open_.append(1)
        assert len(open_) == 1
        assert go_on.wait(120)
        made = draw(*asked)
        open_.pop()
        return made

    async def run() -> None:
        drawing.canvas.draw = counted
        asked = PictureRequest("a", 1, 0, {"steps": 1})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(drawing.draw(asked), 0.1)
        second = asyncio.create_task(drawing.draw(asked))
        await asyncio.sleep(0.1)
        go_on.set()
        assert len(await second) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, None, None, None), "Pass a model, an index"),
        ((None, "n", "i", None), "--name: needs a model"),
        (("m", None, None, "e"), "--embedder: needs --index"),
        (("a/code", None, "b/code", None), "the index already has the name 'code'"),
    ],
)
def test_what_cannot_be_served_is_one_clear_error(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/code").mkdir(parents=True)
    model, name, place, embedder = given
    with pytest.raises(ConfigError, match=said):
        served(model, "sqlite:///x", name, place, embedder)
