"""Tests batch inference of chats, classes, and images: an answer equals that of plain transformers for the input alone, in any
batch, and a killed run resumes."""

import io
import json
import queue
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from heliostat.apps.serve.asks import EMBEDDINGS, kind_of
from heliostat.apps.serve.engine import ServingEngine
from heliostat.curation import pieces
from heliostat.curation.images import sources
from heliostat.curation.stage import Document
from heliostat.curation.text.documents import TextRules
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.inference.batch import loading, reading, run
from heliostat.inference.batch.engines import Chat, Continue, Embed, Input, LoadedModel
from heliostat.inference.batch.tasks import BatchSettings
from heliostat.recipes.images.embedder import ImageEmbedder
from heliostat.recipes.protocol import Request
from heliostat.recipes.text import chat
from heliostat.recipes.text.generator import TextGenerator
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work
from PIL import Image

from tests.unit import build_images, build_model
from tests.unit.build_curation import HereFlow, KilledError
from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model

TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('no question') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHATS = [[{"role": "user", "content": "a b" * n}, *([{"role": "assistant", "content": "c"}] if n % 2 else [])] for n in range(5)]


def write_classifier(folder: Path, labels: tuple[str, ...] = ("bad", "good", "odd"), **keys) -> Path:
    build_model.make_model(folder, labels, **keys)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


def ask(*messages: tuple[str, str]) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in messages])


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    return write_writer(tmp_path_factory.mktemp("writer"))


def write_writer(place: Path) -> Path:
    """Writes a language model with a chat template, and with two tokens that end an answer."""
    folder = write_model(place, BASE["model"], 128)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=[tokenizer.eos_token_id, 40, 50, 60, 70]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Exports an image embedder, with the digits that it was trained for."""
    place = tmp_path_factory.mktemp("clip")
    data = build_images.digits(place / "data", 60)
    made = ImageEmbedder(build_images.embedder(data))
    made.probe()
    made.bind([manifest.read(Location(str(data)))])
    torch.manual_seed(1)
    made.save_config(place / "model")
    model: Any = made.build().eval()
    model.save_pretrained(place / "model")
    return place / "model"


# chat ------------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_plain_transformers_does_in_any_batch(writer):
    engine = Chat(writer, 3, {"max_tokens": 8, "temperature": 0})
    found = engine([Input(json.dumps(one), 0) for one in CHATS])
    tokenizer = transformers.AutoTokenizer.from_pretrained(writer)
    model = transformers.AutoModelForCausalLM.from_pretrained(writer).eval()
    for one, answer in zip(CHATS, found, strict=True):
        ids = tokenizer.apply_chat_template(one, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        ended = out[-1].item() in model.generation_config.eos_token_id
        plain = tokenizer.decode(out[:-1] if ended else out, skip_special_tokens=True)
        assert (answer.bad, answer.values["answer"]) == ("", plain)
        assert answer.values["finish"] == ("stop" if ended else "length")
    assert {answer.values["finish"] for answer in found} == {"stop", "length"}


def test_a_command_answers_a_prompt_as_a_chat_unless_it_is_told_not_to(writer, tmp_path):
    """Both ways are those of batch inference. A model without a template continues its prompts."""
    options = {"max_tokens": 8, "temperature": 0.0}
    message = json.dumps([{"role": "user", "content": "a b"}])
    answers = {True: Chat(writer, 1, options)([Input(message, 0)]), False: Continue(writer, 1, options)([Input("a b", 0)])}
    wanted = {chats: one.values["answer"] for chats, (one,) in answers.items()}
    written = {chats: TextGenerator(writer, {**options, "chat": chats})([Request("a b", 0, None)])[0]
               for chats in (None, True, False)}  # fmt: skip
    assert wanted[True] != wanted[False]
    assert [written[chats].facts["text"] for chats in (None, True, False)] == [wanted[True], wanted[True], wanted[False]]
    assert written[None].shown == wanted[True] and written[False].shown == f"a b{wanted[False]}"
    with pytest.raises(ConfigError, match=r"^chat: has no effect with a suffix"):
        TextGenerator(write_model(tmp_path, BASE["model"]), {"chat": True, "suffix": "c"})
    with pytest.raises(ConfigError, match=r"^chat: the model has no chat template"):
        TextGenerator(tmp_path / "model", {"chat": True})


def test_what_is_no_chat_is_said_and_stops_nothing(writer):
    engine = Chat(writer, 3, {"max_tokens": 4, "temperature": 0})
    bad = [
        "a b",
        "{}",
        "[]",
        ask(("tool", "a")),
        '[{"role": "user", "content": [{"type": "image_url"}]}]',
        ask(("assistant", "a")),
        ask(("user", "half a character: \ud800")),
    ]
    answers = engine([Input(text, 0) for text in [*bad, ask(("user", "a"))]])
    assert [a.bad for a in answers] == ["no_messages"] * 5 + ["template", "template", ""]
    assert "isn't a JSON list" in answers[0].detail and "0.role" in answers[3].detail and "no question" in answers[5].detail
    assert chat.read('[{"role": "user", "content": "a", "name": null, "tool_calls": null}]') == [{"role": "user", "content": "a"}]
    parts = [{"type": "text", "text": "a", "image_url": None}]  # as a Parquet file has them
    assert chat.read(json.dumps([{"role": "user", "content": parts}])) == [{"role": "user", "content": "a"}]


# classes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent", [False, True])
def test_a_class_is_that_of_plain_transformers_in_any_batch(tmp_path, independent):
    kind = {"problem_type": "multi_label_classification"} if independent else {}
    write_classifier(tmp_path, **kind)
    texts = ["a", *build_model.texts(12)]
    assert max(map(len, texts)) > 126
    found = loading.engine(tmp_path, "classify", 4, {})([Input(text, 0) for text in texts])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for text, answer in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, truncation=True, max_length=128, return_tensors="pt")).logits[0].double()
        shares = torch.sigmoid(logits) if independent else torch.softmax(logits, -1)
        assert answer.values["probabilities"] == pytest.approx(shares.tolist(), abs=1e-5)
        assert answer.values["label"] == model.config.id2label[int(shares.argmax())]
        assert answer.values["probability"] == max(answer.values["probabilities"])
        assert answer.values["truncated"] == (len(text) > 126) and answer.values["tokens"] == min(128, len(text) + 2)
    assert len({answer.values["label"] for answer in found}) > 1


def test_a_decoder_that_classifies_reads_the_last_token_of_each_text(writer, tmp_path):
    """Without a padding token, texts of different lengths don't share a batch. With one, from the tokenizer or elsewhere, they
    do."""
    for pad in (None, 7):
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(writer, num_labels=3, pad_token_id=pad)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(writer)
        tokenizer.save_pretrained(tmp_path)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        texts = ["a b", "c d e f", "b", "d e f c"]
        engine = loading.engine(tmp_path, "classify", 4, {})
        assert engine.apart(2, 3) == (pad is None)
        for text, answer in zip(texts, engine([Input(text, 0) for text in texts]), strict=True):
            with torch.no_grad():
                logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
            assert answer.values["probabilities"] == pytest.approx(torch.softmax(logits, -1).tolist(), abs=1e-5)


def test_an_xlnet_reads_the_last_place_so_texts_of_different_lengths_share_no_batch(writer, tmp_path):
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=320, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=3)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(writer).save_pretrained(tmp_path)
    engine, texts = loading.engine(tmp_path, "classify", 4, {}), [Input(text, 0) for text in ("a b", "c d e f", "b")]
    assert engine.apart(2, 3) and not engine.apart(2, 2)
    for one, together in zip(texts, engine(texts), strict=True):
        assert not together.bad, together.detail
        assert together.values["probabilities"] == pytest.approx(engine([one])[0].values["probabilities"], abs=1e-6)


def test_a_model_that_does_not_do_the_task_is_refused_in_a_line(writer, classifier, clip, tmp_path):
    write_classifier(tmp_path / "one", ("score",))
    write_classifier(tmp_path / "scores", problem_type="regression")
    write_model(tmp_path, BASE["model"])
    for folder, task, said in [
        (
            writer,
            "classify",
            "contains LlamaForCausalLM, which has no classification head. Use a model whose class name ends with "
            "ForSequenceClassification",
        ),
        (tmp_path / "one", "classify", "has one label (score)"),
        (tmp_path / "scores", "classify", "has problem_type regression"),
        (clip, "continue", "not supported for a CLIP"),
        (writer, "embed-images", "isn't a CLIP"),
        (tmp_path / "model", "chat", "has no chat template. Use --task continue"),
    ]:
        with pytest.raises(ConfigError) as found:
            loading.require(folder, task)
        assert said in str(found.value) and "\n" not in str(found.value)
    assert loading.require(classifier, "classify") == {"labels": ["bad", "good", "odd"]}
    assert loading.require(writer, "chat") == loading.require(clip, "embed-images") == {}


# images ------------------------------------------------------------------------------------------------------------------


def test_a_clip_is_served_as_an_embedder_of_texts(clip):
    assert kind_of(clip) == EMBEDDINGS
    engine, found = ServingEngine(LoadedModel(clip), 2), queue.Queue[dict]()
    engine.embedded(["the digit seven", "a"], found.put)
    made, right = found.get(timeout=60)["answers"], Embed(clip, 1)([Input("the digit seven", 0), Input("a", 0)])
    for one, other in zip(made, right, strict=True):
        assert one.values["embedding"] == pytest.approx(other.values["embedding"], abs=1e-5)


def png(seed: int, side: int = 8, mode: str = "L") -> bytes:
    return build_images.image(side, side, seed, mode)


def test_images_and_texts_are_embedded_as_plain_transformers_does(clip):
    images = [png(0), png(1), b"none", png(2, 20), png(3, 9, "RGB"), png(4)]
    found = loading.engine(clip, "embed-images", 2, {})([Input("", 0, image) for image in images])
    assert [answer.bad for answer in found] == ["", "", "undecodable", "", "", ""] and "UnidentifiedImageError" in found[2].detail
    model = transformers.AutoModel.from_pretrained(clip).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(clip, backend="pil")
    for data, answer in zip(images, found, strict=True):
        if answer.bad:
            continue
        pixels = processor(images=Image.open(io.BytesIO(data)).convert("L"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            right = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output[0], dim=-1)
        torch.testing.assert_close(torch.tensor(answer.values["embedding"]), right, rtol=1e-4, atol=1e-5)
    texts = ["the digit seven", "a", "a handwritten nine and much more than there is room for, and more"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    for text, answer in zip(texts, Embed(clip, 3)([Input(text, 0) for text in texts]), strict=True):
        with torch.no_grad():
            asked = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
            out = model.get_text_features(input_ids=asked["input_ids"], attention_mask=asked["attention_mask"])
        right = torch.nn.functional.normalize(out.pooler_output[0], dim=-1)
        torch.testing.assert_close(torch.tensor(answer.values["embedding"]), right, rtol=1e-4, atol=1e-5)
        assert answer.values["truncated"] == (len(text) > 20)


def test_an_image_that_would_be_huge_when_it_is_shrunk_is_bad(clip):
    long, most = (build_images.image(1, height, 0, "L") for height in (101, 100))
    found = loading.engine(clip, "embed-images", 2, {})([Input("", 0, one) for one in (long, most)])
    assert [answer.bad for answer in found] == ["undecodable", ""] and "pixels: one is over 100 times" in found[0].detail


# runs --------------------------------------------------------------------------------------------------------------------


def infer(model: Path, asked: BatchSettings, folder: Path, out: Path, **flow) -> dict:
    place = Location(str(out))
    facts = {"model": {"folder": str(model), "digest": "d"}, "settings": asked.model_dump(), "input": str(folder)}
    return run.answer(HereFlow(Work(place.join(run.WORK)), **flow), reading.of(str(folder), asked).listing(), facts, place)


def answers(out: Path) -> list[dict]:
    record = json.loads((out / run.RECORD).read_text())
    return [row for one in record["answers_in"] for row in pq.read_table(out / one["file"]).to_pylist()]


def documents(out: Path, column: str, *columns: str) -> list[Document]:
    """Returns the documents that a text pipeline reads from answers."""
    flow = HereFlow(Work(Location(f"{out}-read")))
    read = reading.Texts(str(out / "answers"), TextRules(text_column=column, normalise="none", columns=columns))
    found = (one for piece in read.pieces(flow, read.listing()) for part in piece for one in read.source(flow).read(part))
    return [one for one in found if isinstance(one, Document)]


def bad(out: Path) -> list[tuple[str, str]]:
    return [(row["id"], row["reason"]) for row in pq.read_table(out / run.BAD).to_pylist()]


def killed_again_and_again(*asked, **flow) -> dict:
    for tries in range(50):
        try:
            found = infer(*asked, seed=tries, **flow)
        except KilledError:
            continue
        assert tries, "it was not killed"
        return found
    raise AssertionError("it does not go on")


def test_a_run_of_chats_reads_lists_and_texts_of_lines_and_tables(writer, tmp_path, monkeypatch):
    """Chats come from JSON and from Parquet. The run is killed at each second task, and answers each chat once."""
    monkeypatch.setattr(reading, "LEAST", 256)
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"messages": one, "n": i} for i, one in enumerate(CHATS * 4)]
    lines = [json.dumps(one) for one in rows] + ['{"messages": 3}', json.dumps({"messages": json.dumps(CHATS[1]), "n": 20})]
    (folder / "a.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.Table.from_pylist([*rows, {"messages": None, "n": 5}]), folder / "b.parquet", row_group_size=3)
    asked = BatchSettings(task="chat", keep=["n"], options={"max_tokens": 4, "temperature": 0.8})
    assert asked.column == "messages"
    whole = infer(writer, asked, folder, tmp_path / "whole")
    found = killed_again_and_again(writer, asked, folder, tmp_path / "out", most=7)
    assert (found["answers"], found["bad"], found["inputs"]) == (41, 2, whole["inputs"])
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    assert bad(tmp_path / "out") == [("a.jsonl#21", "no_text"), ("b.parquet#21", "no_text")]
    made = answers(tmp_path / "out")
    assert [row["n"] for row in made] == [str(n) for n in (*range(21), *range(20))]
    assert json.loads(made[1]["messages"]) == CHATS[1] and made[1]["tokens"] > 0
    read = documents(tmp_path / "out", "answer", "n")
    text = [row for row in made if row["answer"].strip() and "\0" not in row["answer"]]  # the others are no text, and listed
    assert sorted((one.columns["n"], one.text) for one in read) == sorted((row["n"], row["answer"]) for row in text)
    assert len(text) > 30


def test_a_run_of_classes_goes_on_and_its_answers_are_columns(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LEAST", 256)
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in build_model.texts(40)))
    asked = BatchSettings(task="classify", batch=8)
    found = killed_again_and_again(classifier, asked, tmp_path / "in.jsonl", tmp_path / "out", most=6)
    infer(classifier, asked, tmp_path / "in.jsonl", tmp_path / "whole")
    made = answers(tmp_path / "out")
    assert made == answers(tmp_path / "whole") and len(made) == 40
    assert set(made[0]) == {"id", "text", "label", "probability", "probabilities", "tokens", "truncated"}
    assert found["truncated"] == sum(len(row["text"]) > 126 for row in made) > 0
    read = documents(tmp_path / "out", "text", "label", "probability")
    told = [(one.text, one.columns["label"], float(one.columns["probability"])) for one in read]
    assert sorted(told) == sorted((row["text"], row["label"], row["probability"]) for row in made)


@pytest.mark.parametrize("form", ["table", "files"])
def test_a_run_of_images_reads_what_the_image_pipeline_reads(clip, tmp_path, monkeypatch, form):
    """Inputs are columns of Parquet, and files that a metadata file names, without captions. A file that isn't an image is
    listed."""
    monkeypatch.setattr(pieces, "LEAST", 64)
    monkeypatch.setattr(sources, "FILES_PER_TASK", 2)
    folder = tmp_path / "in"
    folder.mkdir()
    images = [png(seed) for seed in range(6)]
    images[3] = b"no image"
    if form == "table":
        for part in range(3):
            rows = [{"image": {"bytes": one, "path": None}, "n": i} for i, one in enumerate(images)][2 * part : 2 * part + 2]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")
    else:
        for i, one in enumerate(images):
            (folder / f"{i}.png").write_bytes(one)
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{i}.png", "n": i}) for i in range(7)))
    asked = BatchSettings(task="embed-images", keep=["n"], batch=4)
    infer(clip, asked, folder, tmp_path / "whole")
    found = killed_again_and_again(clip, asked, folder, tmp_path / "out", most=1)
    made = answers(tmp_path / "out")
    assert made == answers(tmp_path / "whole") and [row["n"] for row in made] == ["0", "1", "2", "4", "5"]
    lost = [("1.parquet#2", "undecodable")] if form == "table" else [("3.png", "undecodable"), ("6.png", "unreadable")]
    assert sorted(bad(tmp_path / "out")) == lost and found["inputs"]
    again = infer(clip, asked, folder, tmp_path / "out")
    assert again["new"] == 0


def test_new_images_are_only_their_own_work(clip, tmp_path, monkeypatch):
    """This holds although the input, and so its pieces, would be twice as large."""
    monkeypatch.setattr(pieces, "LEAST", 64)
    folder, asked = tmp_path / "in", BatchSettings(task="embed-images")
    folder.mkdir()

    def write(part: int) -> None:
        rows = [{"image": {"bytes": png(part * 4 + i), "path": None}} for i in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet", row_group_size=1)

    write(0)
    infer(clip, asked, folder, tmp_path / "out")
    first = {file.name for file in (tmp_path / "out" / "answers").iterdir()}
    write(1)
    infer(clip, asked, folder, tmp_path / "out")
    assert len(first) > 1 and first < {file.name for file in (tmp_path / "out" / "answers").iterdir()}
    assert len(answers(tmp_path / "out")) == 8
