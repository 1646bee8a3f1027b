"""Tests that English words and sentences equal those of spaCy's blank English pipeline, in linear time."""

import random
import time

import pytest
import regex
from heliostat.curation import slices
from heliostat.curation.english import words
from heliostat.curation.english.plain import CODES, SYMBOLS, TERMINALS
from heliostat.curation.english.tokens import _ASCII_INFIX, _INFIX, _MARKS, EXCEPTIONS, LONGEST, QUOTES, tokens

from tests.seeds import every_seed

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


def by_arrays(spoken):
    hashes = spoken.hash.tolist()
    return [spoken.length.tolist(), spoken.symbol.tolist(), spoken.alphabetic.tolist(), first_places(hashes)]


@pytest.mark.parametrize("form", ["{}a", "a{}", "10{}", "({})", "a-{}", "{}-a,", "a{}b.", "A{}.", "a{}'s", "({}--b)"])
def test_every_character_has_the_words_of_the_rules(form):
    every = (chr(code) for code in (*range(0x530), *range(0x2000, 0x3400), *range(0xD7FE, 0xE002), *range(0xFF00, 0x10400)))
    text = " ".join(form.format(character) for character in every)
    assert by_arrays(words.Words().of(text)) == by_words(text)


@every_seed(20)
def test_words_of_plain_parts_are_those_of_the_rules(seed):
    """NumPy splits most of a text. It gives the words of `tokens`, whatever else is in the text, and in whatever slices. A random
    part has up to 60 pieces with marks, so the parts cover all rules of `marked`."""
    draw = random.Random(seed)
    plain = ["word", "it", "Mr", "p", "cannot", "é", "日本", "x" * 257, "don", "US", "C"]
    plain += ["x86_64", "to_list", "2023", "7", "é_2", "1a", "a_1b", "_x1", "1_", "2²", "٣", "x" * 256 + "1"]
    marked = [*"--.',$+/—°", "10km", "5%", "'s", "---", "US$", "a-B", "b.C", "1.2.3.4", "a.com", "﷼B.", "⽂'s", "a--٪"]
    kinds = [
        PIECES,
        _MARKS + QUOTES + ".",
        list(EXCEPTIONS),
        plain,
        plain,
        marked,
        marked,
        [chr(draw.randrange(0x20, 0x3100)), "\U00020000"],
    ]
    spaces = ["\n", " ", "\x85", "\x1c", "  ", "\u2028\t"]
    texts = ["".join(draw.choice(draw.choice([*kinds, spaces, spaces])) for _ in range(draw.randint(0, 60))) for _ in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "BLOCK", draw.choice([1, 50, 1 << 16]))
        patch.setattr(slices, "SLICE", draw.choice([5, 40, 1 << 18]))
        table = words.Words()
        together = [spoken for start in (0, 7, 33) for spoken in table.of_all(texts[start : start + 26])]
    expected = [by_words(text) for start in (0, 7, 33) for text in texts[start : start + 26]]
    assert [by_arrays(spoken) for spoken in together] == expected


def test_no_character_outside_of_the_tables_is_known():
    """A letter or white space after the last code point of the tables would be taken for another character."""
    later = [chr(code) for code in range(CODES - 1, 0x110000)]
    assert not any(character.isalpha() or character.isspace() or character in SYMBOLS for character in later)


@every_seed(20)
def test_marks_between_letters_are_the_same_in_ascii(seed):
    draw, ascii_marks = random.Random(seed), "".join(map(chr, range(33, 127))) + 8 * "aBzZ09.,:<>=/-~+*^'\"`_"
    for _ in range(300):
        text = "".join(draw.choices(ascii_marks, k=draw.randint(1, 9)))
        assert [m.span() for m in _ASCII_INFIX.finditer(text)] == [m.span() for m in _INFIX.finditer(text)], text


@every_seed(20)
def test_sentences_of_a_text_are_those_of_its_parts(seed):
    """Only parts with a terminal are looked at. The count is the one by all words: a sentence begins after a terminal."""
    draw = random.Random(seed)
    pieces = [*SPLIT, " ", " ", " ", "\t", "\xa0", "。", "!", '."', "…", "a"]
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        parts = [part for part in regex.split(r" |([^\S ]\s*)", text) if part is not None]
        split = [word for part in parts for word in (tokens(part) or ("",))]
        count, ended = int(bool(text.strip())), False
        for word in split if text.strip() else ():
            if word in TERMINALS:
                ended = True
            elif ended and not (word and words.is_punctuation(word)):
                count, ended = count + 1, False
        assert words.sentences(text) == count, text


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), (" ", 0), ("One", 1), ("One. Two! Three?", 3), ("He said: \"Go.\" Then he went.", 2), ("Mr. Smith came.", 1),
     ("Version 1.2 is e.g. this one.", 1), ("What?! No.", 2), ("One.  Two.\tThree.", 3), ("What...", 1), ("これは。それは。", 1)],
)  # fmt: skip
def test_sentences(text, count):
    assert words.sentences(text) == count


def lengths(table, text):
    return table.of(text).length.tolist()


def test_the_tables_are_emptied_and_nothing_changes(monkeypatch):
    texts = [f"some words {i} and other-words {i * 7} here." for i in range(300)]
    roomy = words.Words()
    expected = [lengths(roomy, t) for t in texts]
    monkeypatch.setattr(words, "MOST_CACHED", 20)
    monkeypatch.setattr(words, "RECENT_TEXTS", 2)
    small = words.Words()
    assert [lengths(small, t) for t in texts] == expected
    assert len(small._cache) < 60


@pytest.mark.parametrize(
    "text", ["!" * 500_000, "a-" * 250_000, "a@" * 250_000, "." * 500_000, "http://" * 70_000, "x'" * 250_000, "1" * 500_000]
)
def test_hostile_text_takes_linear_time(text):
    start = time.process_time()
    for piece in (text, " ".join(text[i : i + LONGEST] for i in range(0, len(text) // 8, LONGEST))):
        words.Words().of(piece)
        words.sentences(piece)
    assert time.process_time() - start < 5
