"""Tests that English words and sentences equal those of spaCy's blank English pipeline, in linear time."""

import random
import time
import unicodedata

import pytest
import regex
from heliostat.curation.chain import BATCH
from heliostat.curation.english import words
from heliostat.curation.english.characters import (
    ALPHABETIC,
    CODES,
    DECIMAL,
    PUNCTUATION,
    SPACE,
    SYMBOLS,
    TAGS,
    TERMINALS,
    code_points,
    kinds,
)
from heliostat.curation.english.rules import _MARKS, EXCEPTIONS, LONGEST, QUOTES
from heliostat.curation.english.sentences import sentences

from tests.seeds import every_seed
from tests.unit.english_reference import tokens

# what spaCy 3.8 makes of each, word by word
SPLIT = {
    "word": "word", "don't": "do n't", "Can’t": "Ca n’t", "I'd've": "I 'd 've", "cannot": "can not", "its": "its",
    "it's": "it 's", "John's": "John 's", "(well-known)": "( well - known )", "U.S.": "U.S.", "end.": "end .",
    "e.g.": "e.g.", "Mr.": "Mr.",
    "3.14,": "3.14 ,", "10km": "10 km", "$5.00": "$ 5.00", "5%": "5 %", "10pm": "10 pm", "...": "...",
    "wait...what": "wait ... what", "http://example.com/a?b=c": "http://example.com/a?b=c", "a@b.com": "a@b.com",
    "and/or": "and/or", "he/she": "he / she",
    ":)": ":)", "(:-)": "( :-)", "C++": "C++", "a.m.": "a.m.", "--": "--", "one--two": "one -- two", "\"Hi!\"": "\" Hi ! \"",
    "1,000": "1,000", "x=5": "x=5", "key=value": "key = value", "foo.Bar": "foo . Bar", "foo.bar": "foo.bar", "[1]": "[ 1 ]",
    "``code``": "` ` code ` `", "2+2": "2 + 2", "naïve,": "naïve ,", "東京。": "東京 。", "#tag": "# tag",
    "**bold**": "* * bold * *", "I'm.": "I 'm .", "192.168.0.1": "192.168.0.1", "Dr.Smith": "Dr. Smith",
}  # fmt: skip


@pytest.mark.parametrize("text", SPLIT)
def test_words(text):
    assert " ".join(tokens(text)) == SPLIT[text]


def test_nothing_is_lost_by_splitting():
    for text in (*SPLIT, "".join(SPLIT), "x" * (LONGEST + 1)):
        assert "".join(tokens(text)) == text


PIECES = [
    *"abzkmsSCU019_.,:;-–/=~'’$%°²…+*^@<>ßéÄж日ーあ₂Ⓐ☺\u0301\u200b",
    "km",
    "m/s",
    "US$",
    "..",
    "'s",
    "10",
    "://",
    "www.",
    "e.g.",
]


def first_places(values):
    first = {}
    return [first.setdefault(value, place) for place, value in enumerate(values)]


def by_words(text):
    """Returns the number of characters of each word, whether it is a symbol, whether it has a letter, and its first place."""
    split = [word for part in text.split() for word in tokens(part)]
    symbol = [SYMBOLS.issuperset(word) for word in split]
    return [list(map(len, split)), symbol, [any(map(str.isalpha, word)) for word in split], first_places(split)]


def by_arrays(text):
    spoken = words.spoken(code_points(text))
    facts = [((spoken.facts & bit) != 0).tolist() for bit in (words.IS_SYMBOL, words.HAS_LETTER)]
    return [spoken.lengths.tolist(), *facts, first_places(spoken.hashes.tolist())]


@pytest.mark.parametrize("form", ["{}a", "a{}", "10{}", "({})", "a-{}", "{}-a,", "a{}b.", "A{}.", "a{}'s", "({}--b)"])
def test_every_character_has_the_words_of_the_rules(form):
    every = (chr(code) for code in (*range(0x530), *range(0x2000, 0x3400), *range(0xD7FE, 0xE002), *range(0xFF00, 0x10400)))
    text = " ".join(form.format(character) for character in (*every, *map(chr, TAGS), "\U0010ffff"))
    assert by_arrays(text) == by_words(text)


@every_seed(20)
def test_words_are_those_of_the_rules(seed):
    """The compiled loops give the words of regular expressions, for texts of up to 60 random pieces. The pieces cover all rules:
    marks, exceptions and emoticons, units, hosts, addresses, and characters of any script."""
    draw = random.Random(seed)
    plain = ["word", "it", "Mr", "p", "cannot", "é", "日本", "x" * 257, "don", "US", "C"]
    plain += ["x86_64", "to_list", "2023", "7", "é_2", "1a", "a_1b", "_x1", "1_", "2²", "٣", "x" * 256 + "1"]
    marked = [*"--.',$+/—°", "10km", "5%", "'s", "---", "US$", "a-B", "b.C", "1.2.3.4", "a.com", "﷼B.", "⽂'s", "a--٪", "°F."]
    hosts = ["http://", "ftp", "@", "a.b", "1.2.3.4", "192.168", "127.0.0.1", ":80", ":8", "/x", "?", "#", "x.org", "co.uk"]
    kinds = [
        PIECES,
        _MARKS + QUOTES + ".",
        list(EXCEPTIONS),
        plain,
        plain,
        marked,
        marked,
        hosts,
        hosts,
        [chr(draw.randrange(0x20, 0x3100)), "\U00020000", "\ud800", "\U000e0101", chr(draw.randrange(0x110000))],
    ]
    spaces = ["\n", " ", "\x85", "\x1c", "  ", "\u2028\t"]
    texts = ["".join(draw.choice(draw.choice([*kinds, spaces, spaces])) for _ in range(draw.randint(0, 60))) for _ in range(80)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "BLOCK", draw.choice([1, 7, 1 << 16]))
        assert [by_arrays(text) for text in texts] == [by_words(text) for text in texts]


def test_all_exceptions_are_split_and_joined_as_by_the_rules():
    """This includes exceptions that the rules split, next to marks, letters, and each other."""
    every = list(EXCEPTIONS)
    for form in ("{}", "({}", "{},", "a{}", "{}a", "10{}", "{}{}", "-{}-{}-"):
        text = " ".join(form.format(whole, other) for whole, other in zip(every, every[::-1], strict=True))
        assert by_arrays(text) == by_words(text)


def test_no_character_outside_of_the_tables_is_known():
    """A letter or white space after the last code point of the tables would be taken for another character."""
    later = [chr(code) for code in range(CODES, 0x110000) if code not in TAGS]
    assert not regex.search(r"[\w\s\p{So}\p{L}]", "".join(later))
    assert not any(c.isalpha() or c.isspace() or c.isdecimal() or c in SYMBOLS for c in later)
    assert not any(unicodedata.category(character)[0] == "P" for character in later)


def is_punctuation(word):
    return all(unicodedata.category(character)[0] == "P" for character in word)


@every_seed(20)
def test_sentences_of_a_text_are_those_of_its_parts(seed):
    """Only parts with a terminal are looked at. The count is the one by all words: a sentence begins after a terminal."""
    draw = random.Random(seed)
    pieces = [*SPLIT, " ", " ", " ", "\t", "\xa0", "\x1f", "。", "!", '."', "…", "a", "x" * LONGEST, "\ud800"]
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        parts = [part for part in regex.split(r" |([^\S ]\s*)", text) if part is not None]
        split = [word for part in parts for word in (tokens(part) or ("",))]
        count, ended = int(bool(text.strip())), False
        for word in split if text.strip() else ():
            if word in TERMINALS:
                ended = True
            elif ended and not (word and is_punctuation(word)):
                count, ended = count + 1, False
        assert sentences(text) == count, text


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), (" ", 0), ("One", 1), ("One. Two! Three?", 3), ("He said: \"Go.\" Then he went.", 2), ("Mr. Smith came.", 1),
     ("Version 1.2 is e.g. this one.", 1), ("What?! No.", 2), ("One.  Two.\tThree.", 3), ("What...", 1), ("これは。それは。", 1)],
)  # fmt: skip
def test_sentences(text, count):
    assert sentences(text) == count


@pytest.mark.parametrize(
    ("bit", "holds"),
    [(SPACE, str.isspace), (ALPHABETIC, str.isalpha), (DECIMAL, str.isdecimal),
     (PUNCTUATION, lambda c: unicodedata.category(c).startswith("P"))],
)  # fmt: skip
def test_the_kinds_of_characters_are_pythons(bit, holds):
    codes = [*range(CODES), *TAGS]
    assert [bool(kind & bit) for kind in kinds().tolist()] == [*map(holds, map(chr, codes)), False]


def test_the_words_of_a_text_are_split_once_for_all_filters_in_a_row(monkeypatch):
    """A pipeline's filters process the same batch one after another. Only a batch's words stay in memory."""
    texts, split = [f"{number} words, e.g. these. " * 400 for number in range(64)], list[int]()
    expected = [words.spoken(code_points(text)) for text in texts]
    monkeypatch.setattr(words, "spoken", lambda codes, of=words.spoken: split.append(len(codes)) or of(codes))
    recent = words.RecentWords()
    for _ in range(3):
        for text, spoken in zip(texts, expected, strict=True):
            seen = recent.spoken(text, code_points(text))
            assert all((a == b).all() for a, b in zip(seen, spoken, strict=True))
    assert split == list(map(len, texts))
    for text in ("a" * (words.REMEMBERED_CHARS + 1), "b " * (words.REMEMBERED_CHARS // 2), "c"):
        recent.spoken(text, code_points(text))
        assert sum(map(len, recent._words)) <= words.REMEMBERED_CHARS
    assert list(recent._words) == ["c"]


def test_the_words_of_only_a_few_short_texts_stay_in_memory():
    """Each text takes 0.6 KB in addition to its words: 200,000 texts of 8 characters took 126 MiB, twice the smallest
    memory_limit."""
    recent = words.RecentWords()
    for text in map(str, range(1000)):
        recent.spoken(text, code_points(text))
        assert text in recent._words and len(recent._words) <= 2 * BATCH


@pytest.mark.parametrize(
    "text", ["!" * 500_000, "a-" * 250_000, "a@" * 250_000, "." * 500_000, "http://" * 70_000, "x'" * 250_000, "1" * 500_000]
)
def test_hostile_text_takes_linear_time(text):
    start = time.process_time()
    for piece in (text, " ".join(text[i : i + LONGEST] for i in range(0, len(text) // 8, LONGEST))):
        words.spoken(code_points(piece))
        sentences(piece)
    assert time.process_time() - start < 5
