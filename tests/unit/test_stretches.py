"""Tests that tokens by stretches equal the tokenizer's own for any text. Tokenizers of other kinds encode whole texts."""

import itertools
import json
import random
import sys
import unicodedata

import numpy as np
import pytest
from heliostat.curation.text import stretches, tokens
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.unit.build_job import ROOT

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))[:12]]
    return tokens.load(tokens.train([*texts, "naïve café 日本語 Ψ  \u3000 \u200b"], 1200, END))


def plainly(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


def by_stretches(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    found = tokens.encode(tokenizer, texts, 0)
    assert all(one.dtype == np.int32 and one[-1] == 0 for one in found)
    return [one[:-1].tolist() for one in found]


def test_text_around_every_character_that_may_be_white_space(tokenizer):
    """Controls, separators, formats, and some of all other characters, before and after letters, digits, marks, and white
    space."""
    kinds = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) in ("Cc", "Cf", "Zl", "Zp", "Zs")]
    others = [chr(c) for c in range(0, sys.maxunicode, 997) if not 0xD800 <= c < 0xE000]
    texts = [f"a{c} b{c}{c}c \n{c}1{c} 2 {c} .{c}'s{c}  {c}" for c in kinds + others]
    assert by_stretches(tokenizer, texts) == plainly(tokenizer, texts)


def test_random_text(tokenizer):
    rng = random.Random(0)
    letters = [*"abé日1² .,'-!\n\n\t  ", "\r\n", "'s", "'ll", " the", "\xa0", "\u3000", "\x1c", "\u200b", END, "🙂", "e\u0301"]
    texts = ["".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(3000)]
    assert by_stretches(tokenizer, texts) == plainly(tokenizer, texts)


def test_large_texts_are_encoded_in_parts(tokenizer, monkeypatch):
    """They are split where white space begins. A text without any is one part."""
    rng = random.Random(1)
    texts = ["".join(rng.choices(["word", "  ", "\n", " x", "longer"], k=900)), "y" * 500, " " * 300, "z" * 90 + " " + "z" * 90]
    monkeypatch.setattr(tokens, "BATCH_CHARS", 64)
    for text in texts:
        cut = list(stretches.parts(text, 64))
        assert "".join(cut) == text and all(stretches.BEGINS.search(a[-1] + b[0]) for a, b in itertools.pairwise(cut))
    assert len(list(stretches.parts(texts[0], 64))) > 30
    assert by_stretches(tokenizer, texts) == plainly(tokenizer, texts)


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(stretches, "REMEMBERED", 50)
    made = stretches.Stretches(tokenizer)
    texts = [" ".join(f"w{i * 7 + j}" for j in range(20)) + " " + "x" * 100 for i in range(40)]
    for text in texts:
        (ids,) = made.encode([text])
        assert np.frombuffer(ids, np.int32).tolist() == plainly(tokenizer, [text])[0]
        assert 0 < len(made._known) <= 50 and max(map(len, made._known)) <= stretches.LONG


def test_tokenizers_that_cut_otherwise_are_asked_whole_texts(tokenizer):
    """With a normalizer, another pattern, a space before the text, added words, or dropout, their tokens stay the same."""
    made = json.loads(tokenizer.to_str())
    word = {**made["added_tokens"][0], "id": 1200, "content": "a b", "special": False}
    changed = {
        "normalizer": {"normalizer": {"type": "Lowercase"}},
        "prefix": {"pre_tokenizer": made["pre_tokenizer"] | {"add_prefix_space": True}},
        "pattern": {"pre_tokenizer": made["pre_tokenizer"] | {"use_regex": False}},
        "dropout": {"model": made["model"] | {"dropout": 0.5}},
        "word": {"added_tokens": [*made["added_tokens"], word]},
    }  # fmt: skip
    assert stretches.divisible(tokenizer)
    texts = ["Hello  a b world", " x\n y"]
    for name, keys in changed.items():
        other = tokens.load(json.dumps(made | keys))
        assert not stretches.divisible(other), name
        if name != "dropout":
            assert by_stretches(other, texts) == plainly(other, texts), name
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.Whitespace()
    pieces.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False))
    assert not stretches.divisible(tokens.load(pieces.to_str()))


SPECIALS = [("xx", {}), ("<mask>", {"lstrip": True}), ("<|endoftext|>", {}), ("b<|", {}), (" the<", {}), ("|>", {})]


@pytest.mark.parametrize(("has_end", "chosen"), [(False, "b<|"), (True, END)])
@pytest.mark.parametrize("joined", [1, 7, 256])
def test_text_with_pieces_of_special_tokens_is_encoded_as_text(tokenizer, monkeypatch, joined, has_end, chosen):
    """Stretches are joined with a special token that can't overlap itself, and doesn't remove spaces. Text that looks like this
    token, or like one that overlaps it, stays text."""
    monkeypatch.setattr(stretches, "JOINED", joined)
    made = json.loads(tokenizer.to_str())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{**plain, "id": 1300 + i if text != END else 0, "content": text, **keys}
             for i, (text, keys) in enumerate(SPECIALS) if has_end or text != END]  # fmt: skip
    other = tokens.load(json.dumps(made | {"added_tokens": sorted(added, key=lambda one: one["id"])}))
    assert stretches.divisible(other)
    separator = stretches._Separator.of(other)
    assert separator is not None and separator.text == chosen
    rng = random.Random(2)
    pieces = [END, END[:4], END[4:], END[:-1], "x", "b", "<", "<|", "|", ">", " the", "<mask>", " ", "\n", "word", " b"]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(1500)]
    assert by_stretches(other, texts) == plainly(other, texts)


def test_new_stretches_are_encoded_together(tokenizer, monkeypatch):
    alone = list[list[str]]()
    monkeypatch.setattr(stretches.Stretches, "_alone", lambda self, group: alone.append(group) or [b""] * len(group))
    texts = [" ".join(f"w{i * j}" for j in range(900)) for i in range(3)]
    found = stretches.Stretches(tokenizer).encode(texts)
    assert not alone and [np.frombuffer(ids, np.int32).tolist() for ids in found] == plainly(tokenizer, texts)
