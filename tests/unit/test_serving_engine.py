"""Tests the endpoint's engine: rows join and leave the batch, and each row's text equals that of batch inference, for any other
rows."""

import math
import queue
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from heliostat.apps.serve import group
from heliostat.apps.serve.engine import ServingEngine
from heliostat.apps.serve.row import Row, Stopping, Telling
from heliostat.errors import ConfigError
from heliostat.inference.batch.engines import Continue, Embed, Input, LoadedModel
from heliostat.inference.sampling import Draw
from heliostat.recipes.protocol import Request
from heliostat.recipes.text.generator import TextGenerator
from heliostat.recipes.text.server import TextServer
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.unit.build_job import BASE
from tests.unit.build_language_model import ARCHITECTURES, PROMPTS, write_model

MOST = 10
KINDS = {"plain": BASE["model"], "mamba": ARCHITECTURES["mamba"]}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), KINDS[request.param])


@pytest.fixture(scope="module")
def engine(folder):
    return ServingEngine(LoadedModel(folder), 4)


def row(engine: ServingEngine, text: str, seed: int, pieces: queue.Queue, **options) -> Row:
    tokenizer = engine.loaded.tokenizer
    draw = Draw(options.get("temperature", 0.9), options.get("top_p", 0.95), seed)
    made = Row(tokenizer(text or tokenizer.bos_token)["input_ids"], options.get("most", MOST), draw,
               Stopping(options.get("stops", [])), pieces.put, options.get("logprobs"))  # fmt: skip
    engine.begin([made])
    return made


def collected(pieces: queue.Queue) -> dict:
    """Joins the pieces of an answer; returns the answer and the number of pieces."""
    text, count = "", 0
    while True:
        piece = pieces.get(timeout=60)
        assert "failed" not in piece, piece
        text, count = text + piece["text"], count + 1
        if "finish" in piece:
            return {**piece, "text": text, "pieces": count}


def test_infer_serve_generate_and_mlflow_write_the_same_whatever_the_folder_says_of_sampling(tmp_path):
    """They use the end tokens of generation_config.json, but neither its penalty nor its suppressed tokens."""
    plain = write_model(tmp_path, BASE["model"])
    engine = Continue(plain, 1, {"max_tokens": MOST, "temperature": 0})
    (first,) = engine([Input("a b", 0)])
    told = engine.model.generate(torch.tensor([engine.encode("a b")]), max_new_tokens=MOST, do_sample=False)[0, -MOST:].tolist()
    stop = next(i for i in range(2, MOST) if told[i] not in told[:i])
    folder = tmp_path / "strange"
    shutil.copytree(plain, folder)
    GenerationConfig(eos_token_id=[0, told[stop]], repetition_penalty=9.0, suppress_tokens=told[:2],
                     no_repeat_ngram_size=1).save_pretrained(folder)  # fmt: skip
    options = {"max_tokens": MOST, "temperature": 0.0, "top_p": 1.0}

    (inferred,) = Continue(folder, 1, options)([Input("a b", 0)])
    pieces: queue.Queue = queue.Queue()
    served = ServingEngine(LoadedModel(folder), 1)
    row(served, "a b", 0, pieces, temperature=0.0, top_p=1.0)
    (generated,) = TextGenerator(folder, options)([Request("a b", 0, None)])
    mlflows = TextServer()
    mlflows.load_context(SimpleNamespace(artifacts={"model": str(folder)}))
    (logged,) = mlflows.predict(None, ["a b"], {**options, "seed": 0})
    written = inferred.values["answer"]
    assert written and first.values["answer"].startswith(written) and written != first.values["answer"]
    assert [collected(pieces)["text"], generated.facts["text"], logged] == [written] * 3


def test_an_empty_prompt_that_no_token_begins_is_an_error_line_of_the_command():
    generator = TextGenerator.__new__(TextGenerator)
    generator.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    generator.infilling, generator.suffix, generator.ends, generator.chat = None, None, [], False
    with pytest.raises(ConfigError, match=r"^prompt: is empty, and the tokenizer has no beginning-of-document token"):
        generator([Request("", 0, None)])


def test_each_answer_is_that_of_batch_inference_though_rows_come_while_others_are_under_way(folder, engine):
    """Seven prompts of several lengths, with room for four at a time, in two orders."""
    expected = {
        (one.text, one.seed): answer.values
        for one, answer in zip(PROMPTS, Continue(folder, 1, {"max_tokens": MOST, "temperature": 0.9})(PROMPTS), strict=True)
    }
    for order in (PROMPTS, PROMPTS[::-1]):
        waiting = []
        for one in order:
            pieces: queue.Queue = queue.Queue()
            row(engine, one.text, one.seed, pieces)
            waiting.append((one, pieces))
            time.sleep(0.004)
        for one, pieces in waiting:
            made, wanted = collected(pieces), expected[one.text, one.seed]
            assert (made["text"], made["finish"]) == (wanted["answer"], wanted["finish"])
            assert made["completion_tokens"] == wanted["tokens"] and made["pieces"] > 1


def test_rows_have_their_own_temperature_share_and_length_in_one_batch(folder, engine):
    kinds = [{"temperature": 0.0, "top_p": 1.0, "most": 3}, {"temperature": 1.3, "top_p": 0.5, "most": 9},
             {"temperature": 0.7, "top_p": 1.0, "most": 6}]  # fmt: skip
    waiting = [queue.Queue() for _ in kinds]
    for seed, (pieces, kind) in enumerate(zip(waiting, kinds, strict=True)):
        row(engine, "a b", seed, pieces, **kind)
    for seed, (pieces, kind) in enumerate(zip(waiting, kinds, strict=True)):
        options = {"max_tokens": kind["most"], "temperature": kind["temperature"], "top_p": kind["top_p"]}
        (wanted,) = Continue(folder, 1, options)([Input("a b", seed)])
        assert collected(pieces)["text"] == wanted.values["answer"]


def test_a_stop_string_ends_a_row_and_is_not_in_its_text(engine):
    pieces: queue.Queue = queue.Queue()
    row(engine, "a b", 1, pieces, most=20)
    whole = collected(pieces)["text"]
    stop = whole[5:7]
    row(engine, "a b", 1, pieces, most=20, stops=[stop])
    made = collected(pieces)
    assert (made["text"], made["finish"]) == (whole[: whole.index(stop)], "stop") and made["completion_tokens"] < 20


def test_logprobs_are_the_models_own_and_belong_to_the_text(folder, engine):
    pieces: queue.Queue = queue.Queue()
    made = row(engine, "a b", 1, pieces, temperature=0.0, logprobs=3)
    told: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    text = ""
    while True:
        piece = pieces.get(timeout=60)
        text += piece["text"]
        for name, values in told.items():
            values += piece["logprobs"][name]
        if "finish" in piece:
            break
    with torch.inference_mode():
        ids = torch.tensor([made.prompt + made.tokens])
        truth = torch.log_softmax(engine.loaded.model(input_ids=ids).logits[0].double(), -1)
    wanted = [float(truth[len(made.prompt) - 1 + i, token]) for i, token in enumerate(made.tokens)]
    assert told["token_logprobs"] == pytest.approx(wanted, abs=1e-4) and len(wanted) == piece["completion_tokens"]
    assert len(told["tokens"]) == len(wanted) and all(0 <= offset <= len(text) for offset in told["text_offset"])
    best = told["top_logprobs"][0]
    assert 1 <= len(best) <= 3 and max(best.values()) == pytest.approx(
        told["token_logprobs"][0], abs=1e-9
    )  # the likeliest was taken


FACE = [3, 4, 5, 6]  # a character, in a token for each of its bytes
WITHOUT_TEXT = 7
BYTES = {"level": decoders.ByteLevel(), "fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])}


@pytest.mark.parametrize(
    ("tokens", "stops", "most", "offsets"),
    [
        ([0, *FACE], [], 5, [0, 1, 1, 1, 1]),
        ([0, *FACE, 99], [], 9, [0, 1, 1, 1, 1]),
        ([0, *FACE[:3]], [], 4, [0, 1, 1, 1]),
        ([0, *FACE, 1, 99], [], 9, [0, 1, 1, 1, 1, 2]),
        ([0, *FACE, 1], ["b"], 9, [0, 1, 1, 1, 1]),
        ([0, *FACE, 1, 2], ["c"], 9, [0, 1, 1, 1, 1, 2]),
        ([0, 1, WITHOUT_TEXT], [], 3, [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("decoder", BYTES)
def test_each_token_of_an_answer_has_its_logprob_also_one_that_is_a_piece_of_a_character(tokens, stops, most, offsets, decoder):
    """For any end of the answer; only tokens of a stop string have none. The pieces of a character begin where the character
    does."""
    written = "ðŁĺĢ" if decoder == "level" else [f"<0x{b:02X}>" for b in "\N{GRINNING FACE}".encode()]
    raw = Tokenizer(models.BPE({token: id for id, token in enumerate([*"abc", *written])}, []))
    raw.decoder = BYTES[decoder]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=["<|end|>"])
    pieces: queue.Queue = queue.Queue()
    row = Row([0], most, Draw(1.0, 1.0, 0), Stopping(stops), pieces.put, 1)
    telling = Telling(tokenizer, [99])
    for token in tokens:
        telling.take(row, token, {"chosen": -float(token), "best": [(token, -float(token))]})
    told = [piece["logprobs"] for piece in pieces.queue]
    assert [offset for one in told for offset in one["text_offset"]] == offsets
    assert [value for one in told for value in one["token_logprobs"]] == [-float(token) for token in tokens[: len(offsets)]]
    assert row.over and pieces.queue[-1]["completion_tokens"] == len(row.tokens)


def test_a_row_that_nobody_waits_for_leaves_and_embeddings_come_between_steps(folder, engine):
    dropped, others = queue.Queue(), queue.Queue()
    gone = row(engine, "a b", 1, dropped, most=25)
    dropped.get(timeout=60)
    gone.over = True
    row(engine, "c", 2, others)
    found: queue.Queue = queue.Queue()
    engine.embedded(["a b", "c d e"], found.put)
    made = found.get(timeout=60)["answers"]
    wanted = Embed(folder, 1)([Input("a b", 0), Input("c d e", 0)])
    for one, other in zip(made, wanted, strict=True):
        assert one.values["embedding"] == pytest.approx(other.values["embedding"], abs=1e-5)
    assert math.isclose(sum(x * x for x in made[0].values["embedding"].tolist()), 1, abs_tol=1e-4)
    assert collected(others)["finish"] in ("stop", "length")
    deadline = time.monotonic() + 30
    while engine.groups:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(gone.tokens) < 25


@pytest.fixture
def writer(tmp_path):
    """Returns a model whose rows may share a batch, in its own engine."""
    folder = write_model(tmp_path, BASE["model"], 1024)
    made = ServingEngine(LoadedModel(folder), 8)
    made.folder = folder
    return made


def alone(engine: ServingEngine, texts: list[str], most: int) -> list[str]:
    options = {"max_tokens": most, "temperature": 0.0, "top_p": 1.0}
    found = Continue(engine.folder, 1, options)([Input(text, 0) for text in texts])
    return [one.values["answer"] for one in found]


def asked(engine: ServingEngine, texts: list[str], most: int) -> list[queue.Queue]:
    """Returns answers in progress that the engine takes all at once."""
    waiting = [queue.Queue() for _ in texts]
    with engine.work:
        for text, pieces in zip(texts, waiting, strict=True):
            row(engine, text, 0, pieces, most=most, temperature=0.0, top_p=1.0)
    return waiting


LONG, BRIEF = "a b c d e " * 60, ["a b", "c", "d e"]


def test_a_long_prompt_pads_no_other_rows_cache(writer, monkeypatch):
    """The rows of a group have about the same length. The texts equal those of each prompt alone."""
    shapes, step = [], group.RowBatch.step

    def seen(self, tokens):
        shapes.append((int(self.mask.sum(1).min()), self.mask.shape[1]))
        step(self, tokens)

    monkeypatch.setattr(group.RowBatch, "step", seen)
    waiting = asked(writer, [BRIEF[0], LONG, *BRIEF[1:]], 12)
    assert [collected(pieces)["text"] for pieces in waiting] == alone(writer, [BRIEF[0], LONG, *BRIEF[1:]], 12)
    assert max(width for _, width in shapes) > 200 and all(width <= 2 * max(least, 64) for least, width in shapes)


def test_rows_are_admitted_by_the_memory_of_their_tokens(writer, monkeypatch):
    """Memory is enough for two of the eight rows that a batch may have. The long row gets its turn, alone."""
    collected(asked(writer, ["a"], 2)[0])
    writer.memory, held = 2.2 * 16 * writer.place_bytes, []
    step = group.RowBatch.step

    def seen(self, tokens):
        held.append(sum(len(rows) for _, rows in writer.groups))
        step(self, tokens)

    monkeypatch.setattr(group.RowBatch, "step", seen)
    texts = ["a b", "c", "d e", LONG, "b"]
    waiting = asked(writer, texts, 12)
    assert [collected(pieces)["text"] for pieces in waiting] == alone(writer, texts, 12)
    assert 1 in held and max(held) <= 2


def test_where_memory_runs_out_the_longest_request_fails_and_no_other(writer, monkeypatch):
    step, failed = group.RowBatch.step, []

    def full(self, tokens):
        if not failed and len(self) == 3 and self.mask.shape[1] > 8:
            failed.append(len(self))
            self.cache.layers[0].keys = self.cache.layers[0].keys[:1]  # as torch leaves it in the midst of a step
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, tokens)

    monkeypatch.setattr(group.RowBatch, "step", full)
    texts = ["a b", "c d e a b", "d"]
    waiting = asked(writer, texts, 12)
    while "failed" not in (piece := waiting[1].get(timeout=60)):
        pass
    assert "out of memory" in piece["failed"] and failed
    wanted = alone(writer, texts, 12)
    assert [collected(waiting[i])["text"] for i in (0, 2)] == [wanted[0], wanted[2]]


def test_rows_that_cannot_be_joined_for_lack_of_memory_step_apart(writer, monkeypatch):
    """The group that they were to join stays unchanged."""
    cat, calls = torch.cat, []

    def full(tensors, dim=0):
        if calls and tensors[0].ndim == 4 and len(tensors[0]) != len(cat(tensors, dim)):  # of rows, of a cache
            calls.append(len(calls))
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return cat(tensors, dim)

    waiting = asked(writer, ["a b"], 200)
    waiting[0].get(timeout=60)
    monkeypatch.setattr(group, "torch", SimpleNamespace(**{**vars(torch), "cat": full}))
    calls.append(0)
    waiting += asked(writer, ["c"], 30)
    second = collected(waiting[1])
    assert len(calls) >= 4 and second["text"] == alone(writer, ["c"], 30)[0]
    first = collected(waiting[0])
    assert first["text"] and alone(writer, ["a b"], 200)[0].endswith(first["text"])


def test_embeddings_that_fail_together_are_made_request_by_request(writer, monkeypatch):
    embed = writer.embed

    def full(inputs):
        if len(inputs) > 2 or any("e" in one.text for one in inputs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(inputs)

    monkeypatch.setattr(writer, "embed", full)
    first, second = queue.Queue(), queue.Queue()
    with writer.work:
        writer.embedded(["a", "b"], first.put)
        writer.embedded(["e"], second.put)
    assert len(first.get(timeout=60)["answers"]) == 2 and "out of memory" in second.get(timeout=60)["failed"]
