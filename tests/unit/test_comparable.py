"""Tests the words that are compared: they follow a plain definition, in every script and Unicode form, wherever a text is
split."""

import itertools
import random
import tracemalloc
import unicodedata

import numpy as np
import pytest
import regex
from heliostat.curation import comparable
from heliostat.curation.comparable import counted, edges, hashed, words
from heliostat.curation.stages.repeated_spans import RepeatedSpans
from heliostat.tasks import spill

MARKS = regex.compile(
    r"[[\p{M}&&[\p{Inherited}\p{Latin}\p{Greek}\p{Cyrillic}\p{Arabic}\p{Hebrew}]]--[\u3099\u309a]]|\p{Cf}", regex.V1
)
NUMBER = regex.compile(r"\p{Nd}(?:[.,:/\-]?\p{Nd})*")
ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Khmer}"
WORD = regex.compile(rf"[[{ALONE}]&&\p{{L}}][\p{{M}}]*|[[\p{{L}}\p{{N}}\p{{M}}]--[{ALONE}]]+", regex.V1)


def reference(text: str) -> list[str]:
    """Finds the words of a text by the plain definition: decomposed, without marks, in lower case, and each number as 0."""
    plain = MARKS.sub("", unicodedata.normalize("NFD", text)).lower()
    return WORD.findall(NUMBER.sub("0", unicodedata.normalize("NFC", plain)).replace("ς", "σ"))


def same(*texts: str) -> bool:
    """Returns whether texts have the same words. Different words in them never compare as equal."""
    found = words(texts)
    parts = np.split(found.hashes, np.cumsum(found.counts))[: len(texts)]
    return all(part.tolist() == parts[0].tolist() and len(part) for part in parts)


@pytest.mark.parametrize(("one", "other"), [
    ("Élan VITAL, à la carte", "elan vital a\nla   carte!"),
    ("in 2019 it grew by 12.5 %", "in 1,204 it grew by 7 %"),
    ("on 2026-11-29 at 02:57:38", "on 1 at 2"),
    ("naïve café", "nai\u0308ve cafe\u0301"),
    ("Ελλάδα ΣΊΣΥΦΟΣ", "ελλαδα σισυφος"),
    ("Йод и ёлка", "иод и елка"),
    ("مُحَمَّد", "محمد"),
    ("१२ किताबें", "३४५ किताबें"),
    ("がっこう", "か\u3099っこう"),
    ("한국어", unicodedata.normalize("NFD", "한국어")),
    ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
    ("ＡＢＣ１２ ℝ", "abc7 r"),
], ids=lambda text: text[:10])  # fmt: skip
def test_texts_that_say_the_same_have_the_same_words(one, other):
    assert same(one, other)


@pytest.mark.parametrize(("one", "other"), [("कि", "की"), ("がき", "かき"), ("गढ़", "गढ"), ("abc", "abd"), ("中华", "中国"),
                                            ("ab", "ba"), ("x1", "x")])  # fmt: skip
def test_words_that_differ_stay_apart(one, other):
    assert not same(one, other)


def test_scripts_without_spaces_have_a_word_for_each_character_with_its_marks():
    assert words(["中华人民共和国", "ภาษาไทยดี", "हिन्दी में लिखा", "ソース abc"]).counts.tolist() == [7, 8, 3, 4]
    assert words(["กี่", "हिन्दी"]).counts.tolist() == [1, 1]


SCRIPTS = [
    *map(list, ("abcXYZ", "éÀßøŁ", "019٣५", ".,:/-", " \n\t!?_'|", "αΣς", "йЁж", "中华人", "한글", "\u200b\u00ad😀")),
    ["が", "ぱ", "ア", "か\u3099"],
    ["ไ", "ยี่", "ก"],
    ["कि", "क्", "म", "की"],
    ["א", "בָ", "بُ"],
    ["e\u0301", "o\u0308\u0323"],
]


def test_the_words_are_those_of_the_plain_definition():
    """For random strings, the number of words is the same, and two words are equal exactly if the definition's are."""
    rng = random.Random(0)
    texts = ["".join(rng.choice(rng.choice(SCRIPTS)) for _ in range(rng.randrange(40))) for _ in range(3000)]
    found, wanted = words(texts), [reference(t) for t in texts]
    assert found.counts.tolist() == [len(w) for w in wanted] == [counted(text) for text in texts]
    by: dict[str, int] = {}
    flat = list(itertools.chain.from_iterable(wanted))
    for hash, word in zip(found.hashes.tolist(), flat, strict=True):
        assert by.setdefault(word, hash) == hash, word
    assert len(set(by.values())) == len(by) > 2000


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_word_has_one_hash_wherever_the_text_is_cut(monkeypatch, block):
    rng = random.Random(block)
    texts = ["".join(rng.choice(rng.choice(SCRIPTS)) for _ in range(60)) for _ in range(50)] + ["plain ascii 12.5 text"]
    whole = words(texts)
    monkeypatch.setattr(comparable, "BLOCK", block)
    again = words(texts)
    for name in ("counts", "hashes", "exact", "numbers"):
        assert getattr(again, name).tolist() == getattr(whole, name).tolist(), name


def test_every_character_is_where_it_was_in_nfc_or_not():
    """A text and its NFC have the same word numbers, so that parts compared in NFC are cut from the text itself."""
    every = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    for one in every:
        form = unicodedata.normalize("NFC", one)
        if form != one:
            assert len(edges(f"a {one} b")) == words([f"a {one} b"]).counts[0], hex(ord(one))
    rng = random.Random(2)
    for _ in range(300):
        text = unicodedata.normalize("NFD", "".join(rng.choice(rng.choice(SCRIPTS)) for _ in range(30)))
        assert len(edges(text)) == words([text]).counts[0]
    text = "Un cafe\u0301, 12.50 e\u0301t 中文"
    assert [text[a:b] for a, b in edges(text)] == ["Un", "cafe", "12.50", "e\u0301t", "中", "文"]


ODD = [range(0x300, 0x370), range(0x590, 0x700), range(0x900, 0x1000), range(0x1000, 0x1200), range(0x1AB0, 0x1B50),
       range(0x3040, 0x3100), range(0xAC00, 0xAD00), range(0xFB00, 0xFB50), range(0x110A0, 0x11140), range(0x11340, 0x11380),
       [*range(0x200B, 0x2010), 0xFE0F, 0x3099, 0x309A, 0x34F0, 0x1F469, 0x1F3FD], [*map(ord, "ab 1.9,-\n")]]  # fmt: skip


def test_words_and_their_places_are_as_many_whatever_the_marks_and_their_order():
    """NFC reorders marks of several scripts in a row. If a word begins there, the text has a word at that place."""
    rng = random.Random(4)
    for _ in range(2500):
        some = rng.sample(ODD, rng.randint(1, 3))
        text = "".join(chr(rng.choice(rng.choice(some))) for _ in range(rng.randrange(1, 14)))
        places = edges(text)
        assert len(places) == words([text]).counts[0], ascii(text)
        assert (np.diff(places.ravel()) >= 0).all() and places.min(initial=0) >= 0 and places.max(initial=0) <= len(text)
    odd = "\u094d\u309a"  # one word as written, two in NFC
    assert len(edges(odd)) == 2 and len(RepeatedSpans(words=10).cut(f"a {odd} b " + "c " * 9, {7}).text) < 24


def test_a_word_of_any_length_takes_bounded_memory_and_is_whole_up_to_a_length(monkeypatch):
    monkeypatch.setattr(comparable, "BLOCK", 64)
    monkeypatch.setattr(comparable, "LONGEST", 256)
    long = "abcdefgh" * 100
    for before in ("", "a ", "word " * 20, "(" * 63):
        one, other = words([f"{before}{long[:256]} end"]), words([f"{long[:256]}"])
        assert one.hashes[-2] == other.hashes[0]
        pieces, alone = words([f"{before}{long}"]), words([f" {long}"])
        assert pieces.counts[0] == before.count("a") + before.count("word") + 3
        assert pieces.hashes[-3:].tolist() == alone.hashes.tolist(), "pieces begin where the word does"
        assert len(edges(unicodedata.normalize("NFD", f"{before}{'é' * 800}"))) == words([f"{before}{'é' * 800}"]).counts[0]


@pytest.mark.parametrize(
    ("text", "most"), [("x" * 2_000_000, 2), ("a b c d e f g h " * 130_000, 25), ("e\u0301 " * 400_000, 32)],
    ids=["a word", "letters", "letters not in NFC"],
)  # fmt: skip
def test_words_of_a_large_text_take_few_bytes_for_each_of_its_own(monkeypatch, text, most):
    monkeypatch.setattr(comparable, "BLOCK", 1 << 13)
    monkeypatch.setattr(comparable, "LONGEST", 1 << 14)  # a share of what they are
    words(["a 1"])
    tracemalloc.start()
    try:
        words([text]).ngrams(5)
        edges(text)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < most * len(text)


def test_n_grams_of_numbers_alone_are_compared_as_written():
    """Otherwise every table of numbers would be the same text."""
    one, other, prose, prose_too = "1 2 3 4 5 6", "7 8 9 10 11 12", "in 3 of 5 years it was 7", "in 4 of 9 years it was 8"
    found, counts = words([one, other, prose, prose_too]).ngrams(3)
    parts = [set(part.tolist()) for part in np.split(found, np.cumsum(counts))]
    assert not parts[0] & parts[1] and parts[2] == parts[3] and len(parts[0]) == 4
    (a, b, c), _ = words(["12.5 3", "12.5 3", "125 3"]).ngrams(5, short=True)
    assert a == b != c


def test_n_grams_are_those_of_each_text():
    texts = ["a b c d e f g", "", "h i j k l", "m n o", "p", "!?"]
    found, counts = words(texts).ngrams(5, short=True)
    assert counts.tolist() == [3, 0, 1, 1, 1, 0] and len(set(found.tolist())) == 6
    alone = [hash for text in texts for hash in words([text]).ngrams(5, short=True)[0].tolist()]
    assert alone == found.tolist()
    assert words(texts).ngrams(5)[1].tolist() == [3, 0, 1, 0, 0, 0] and not len(words([]).hashes)


def plain_hash(values) -> int:
    """Returns the hash of a span by its definition: a polynomial modulo 2^64, mixed by splitmix64's finalizer."""
    z = sum(int(value) * pow(comparable.FACTOR, i, 1 << 64) for i, value in enumerate(values)) % (1 << 64)
    return int(spill.mixed(np.array([z], np.uint64))[0])


def test_spans_are_hashed_by_their_content():
    """Files of earlier versions have these hashes."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 63, 500).astype(np.uint64)
    values[300:350] = values[20:70]
    starts, stops = np.arange(0, 450), np.arange(50, 500)
    found = hashed(values, starts, stops)
    assert found[20] == found[300] and len(set(found.tolist())) == len(found) - 1
    for first, last in ((starts, stops), (starts[::60], starts[::60] + 7), (starts, np.minimum(starts + starts % 3 * 9, 450))):
        last = np.maximum.accumulate(last)
        wanted = [plain_hash(values[a:b]) for a, b in zip(first, last, strict=True)]
        assert hashed(values, first, last).tolist() == wanted
    assert hashed(np.array([97, 98], np.uint8), np.array([0]), np.array([2])).tolist() == [12133279004543813465]


def test_a_word_is_hashed_by_the_characters_of_the_plain_definition():
    """Files of earlier versions have these hashes: of a word's folded characters, each number as one 0; and of numbers as
    written."""
    rng = random.Random(8)
    texts = ["".join(rng.choice(rng.choice(SCRIPTS[:8])) for _ in range(30)) for _ in range(300)]
    found = words(texts)
    plain = [word for text in texts for word in reference(text)]
    assert found.hashes.tolist() == [plain_hash(map(ord, word)) for word in plain]
    assert [word == "0" for word in plain] == found.numbers.tolist()
    assert (found.exact == found.hashes)[~found.numbers].all()
    one = words(["in 12.5\u200b0 x2"])
    assert one.exact.tolist() == [plain_hash(map(ord, word)) for word in ("in", "12.50", "x0")]
