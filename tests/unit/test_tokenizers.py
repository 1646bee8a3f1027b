"""Tests tokenizers: one that isn't the model's is rejected, and byte counts are those of the text, for every kind of
tokenizer."""

import hashlib
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from heliostat.curation.text.tokens import encode, load
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.vocabulary import sizes
from heliostat.storage.locations import Location
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig

from tests.unit.build_job import ROOT, job

END = "<|end|>"
TEXTS = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))[:6]]
HELD = ["naïve café, Ψ and ünïcode: 日本語 text\n\n\tindented  twice", "Hello world, it's a (fine) day.", " begins with a space"]


def byte_level(prefix: bool, sequence: bool) -> tuple[Tokenizer, object]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]) if sequence else decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(vocab_size=800, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)


def llama() -> tuple[Tokenizer, object]:
    """Returns SentencePiece's BPE with byte fallback, like that of Llama 2."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    special = ["<unk>", END, *(f"<0x{i:02X}>" for i in range(256))]
    return made, trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=70, show_progress=False)


def metaspace() -> tuple[Tokenizer, object]:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    alphabet = sorted(set("".join(HELD)) - {" "})
    return made, trainers.UnigramTrainer(vocab_size=800, special_tokens=["<unk>", END], unk_token="<unk>", show_progress=False,
                                         initial_alphabet=alphabet)  # fmt: skip


def word_piece() -> tuple[Tokenizer, object]:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return made, trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]", END], show_progress=False)


def word_ends() -> tuple[Tokenizer, object]:
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return made, trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", END], end_of_word_suffix="</w>",
                                     show_progress=False)  # fmt: skip


KINDS = {
    "byte-level": lambda: byte_level(False, False),
    "byte-level, prefixed": lambda: byte_level(True, True),
    "byte fallback": llama,
    "metaspace": metaspace,
    "word pieces": word_piece,
    "word ends": word_ends,
}


@cache
def trained(kind: str, texts: int = len(TEXTS)) -> str:
    made, trainer = KINDS[kind]()
    made.train_from_iterator(TEXTS[:texts], trainer)
    whole = json.loads(made.to_str())
    # byte fallback's tokens are ordinary ones
    whole["added_tokens"] = [t for t in whole["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(whole)


def dataset(folder: Path, definition: str, texts: list[str] | None = None) -> manifest.Manifest:
    """Writes a dataset of one or several documents, made with the tokenizer."""
    (folder / "shards").mkdir(parents=True)
    tokenizer = Tokenizer.from_str(definition)
    end = tokenizer.token_to_id(END)
    tokens = [t.tolist() for t in encode(load(definition), texts or ["a text"], end)]
    pq.write_table(pa.table({"tokens": tokens}), folder / "shards" / "0.parquet", write_page_checksum=True)
    (folder / "tokenizer.json").write_text(definition)
    meta = {"kind": "tokens", "tokenizer": hashlib.sha256(definition.encode()).hexdigest(), "end_of_document": end,
            "vocab_size": tokenizer.get_vocab_size()}  # fmt: skip
    rows = manifest.read_footer(Location(str(folder)), "shards/0.parquet", "tokens")
    return manifest.write(Location(str(folder)), rows, meta)


def model_folder(folder: Path, definition: str | None) -> CausalLM:
    """Returns a pretrained model's recipe; its folder has the tokenizer."""
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=1000)
    config.save_pretrained(folder)
    if definition:
        (folder / "tokenizer.json").write_text(definition)
    return CausalLM(job(model={"pretrained": str(folder)}))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_stand_for_the_bytes_of_the_text(kind):
    """Summed token by token over complete documents. If words are split at punctuation, the bytes are those of the decoded
    text."""
    tokenizer = Tokenizer.from_str(trained(kind))
    inside, opening = sizes(tokenizer, tokenizer.get_vocab_size())
    for text in TEXTS + HELD:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        counted = opening[ids[0]] + sum(inside[i] for i in ids[1:])
        if kind.startswith("word"):
            assert counted == pytest.approx(len(tokenizer.decode(ids).encode()), rel=0.001, abs=1)
        elif kind not in ("byte-level, prefixed", "metaspace") or not text.startswith(" "):  # to these as if there were none
            assert counted == len(text.encode())
    assert inside[tokenizer.token_to_id(END)] == opening[tokenizer.token_to_id(END)] == 0


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "metaspace"])
def test_bits_per_byte_is_nats_by_the_bytes_of_the_text(kind, tmp_path):
    """For packed documents with an untrained model: the scores divide by the bytes of the text in the files."""
    source = dataset(tmp_path / "data", trained(kind))
    made = CausalLM(job(**{"data.sequence_length": 256, "model.vocab_size": 1000}))
    made.bind([source])
    texts = [text[:200] for text in TEXTS[:8]]
    flat = np.concatenate(encode(load(trained(kind)), texts, made.end))
    assert len(flat) > 256
    content = np.concatenate([[made.end], flat])[None, :256].astype(np.int32)  # every token of the texts is predicted
    model = made.build()
    with torch.no_grad():
        scores = {k: float(v.sum()) for k, v in made.evaluate(model, made.batch(content)).items()}
    pieces, text = np.split(content[0], np.flatnonzero(content[0] == made.end) + 1), 0
    whole = [p for p in pieces[1:-1] if p[-1] == made.end]
    assert len(whole) >= 2
    text = sum(len(t.encode()) for t in texts[: len(whole)]) + _bytes_of_the_rest(made, pieces[-1], texts[len(whole)])
    assert scores["bytes"] == text
    assert made.metrics(scores)["bits_per_byte"] == pytest.approx(scores["nats"] / math.log(2) / text)


def _bytes_of_the_rest(made: CausalLM, tokens: np.ndarray, text: str) -> int:
    """Returns the bytes of a document that the sample truncates: of the text up to there, as its tokens decode."""
    part = made.raw_tokenizer.decode(tokens.tolist())
    assert text.startswith(part)
    return len(part.encode())


def test_a_model_with_another_tokenizer_is_refused_by_name_with_the_fix(tmp_path):
    """Kind and size are the same, but the tokens differ. It trained at once, on token numbers with another meaning for the
    model."""
    source = dataset(tmp_path / "data", trained("byte-level"))
    made = model_folder(tmp_path / "model", trained("byte-level", texts=2))
    with pytest.raises(ConfigError) as e:
        made.bind([source])
    message = str(e.value)
    assert message.startswith(
        f"model.pretrained: '{tmp_path / 'model'}': the model's tokenizer differs from the tokenizer of data.sources.0.path"
    )
    assert f"'{tmp_path / 'data'}'" in message and f"`tokenizer: {{path: {tmp_path / 'model'}}}`" in message
    assert "in the dataset's tokenizer and" in message and "\n" not in message


@pytest.mark.parametrize("change", ["merges", "normalizer", "pre_tokenizer", "byte_fallback", "end", "kind", "added"])
def test_tokenizers_are_compared_by_everything_that_decides_about_tokens(change, tmp_path):
    source = dataset(tmp_path / "data", trained("byte-level"))
    other = json.loads(trained("metaspace" if change == "kind" else "byte-level"))
    if change == "merges":
        other["model"]["merges"] = other["model"]["merges"][:-1]
    elif change == "normalizer":
        other["normalizer"] = {"type": "Lowercase"}
    elif change == "pre_tokenizer":
        other["pre_tokenizer"]["add_prefix_space"] = True
    elif change == "byte_fallback":
        other["model"]["byte_fallback"] = True
    elif change == "end":
        other["added_tokens"][0]["content"] = "</s>"
        other["model"]["vocab"]["</s>"] = other["model"]["vocab"].pop(END)
    elif change == "added":
        added = {**other["added_tokens"][0], "id": 800, "content": "    ", "special": False}
        other["added_tokens"].append(added)
    made = model_folder(tmp_path / "model", json.dumps(other))
    with pytest.raises(ConfigError, match="the model's tokenizer differs from the tokenizer of"):
        made.bind([source])


def test_the_same_tokenizer_is_taken_however_it_is_written(tmp_path):
    """As transformers writes it again: with padding, a template, more special tokens, and none of the dataset's spaces."""
    definition = trained("byte-level")
    source = dataset(tmp_path / "data", definition)
    first = model_folder(tmp_path / "first", definition)
    first.bind([source])
    first.save_config(tmp_path / "again")
    AutoTokenizer.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("a text")["input_ids"]
    CausalLM(job(model={"pretrained": str(tmp_path / "again")})).bind([source])
    scratch = CausalLM(job(**{"model.vocab_size": 1000}))
    scratch.bind([source])
    scratch.save_config(tmp_path / "scratch")
    CausalLM(job(model={"pretrained": str(tmp_path / "scratch")})).bind([source])
    more = Tokenizer.from_str(definition)
    more.add_special_tokens(["<pad>", "<|user|>"])
    more.enable_padding(pad_token="<pad>")
    more.enable_truncation(12)
    model_folder(tmp_path / "more", json.dumps(json.loads(more.to_str()), indent=2)).bind([source])


def test_a_model_folder_without_a_tokenizer_is_refused_before_training(tmp_path):
    """The export would need it, after the whole training."""
    source = dataset(tmp_path / "data", trained("byte-level"))
    with pytest.raises(ConfigError, match=r"model\.pretrained: .* contains no readable tokenizer"):
        model_folder(tmp_path / "model", None).bind([source])
    with pytest.raises(ConfigError, match=r"model\.pretrained: .*can't read tokenizer\.json"):
        model_folder(tmp_path / "model", "{}").bind([source])
