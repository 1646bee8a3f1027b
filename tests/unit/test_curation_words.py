"""Tests that English words and sentences equal those of spaCy's blank English pipeline, in linear time."""

import random
import time

import pytest
from heliostat.curation.english import words
from heliostat.curation.english.tokens import _EXCEPTIONS, _MARKS, _QUOTES, LONGEST, by_rules, tokens

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


@every_seed(20)
def test_common_strings_have_the_words_of_the_rules(seed):
    draw = random.Random(seed)
    marks, known = _MARKS + _QUOTES + ".", list(_EXCEPTIONS)
    for _ in range(300):
        kinds = [PIECES, marks, known, ["a", "B", "A1", "b_", "1"], [chr(draw.randrange(33, 0x3100))]]
        text = "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randint(1, 6)))
        if len(text.split()) == 1:
            assert tokens(text) == by_rules(text), text


@pytest.mark.parametrize("form", ["{}a", "a{}", "10{}", "({})", "a-{}", "{}-a,", "a{}b."])
def test_every_character_has_the_words_of_the_rules(form):
    every = (chr(code) for code in (*range(0x21, 0x530), *range(0x2000, 0x2800), *range(0x3000, 0x3400), *range(0xFF00, 0xFFF0)))
    texts = [form.format(character) for character in every if not character.isspace()]
    assert [text for text in texts if tokens(text) != by_rules(text)] == []


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
    monkeypatch.setattr(words, "MOST_WORDS", 20)
    monkeypatch.setattr(words, "RECENT_TEXTS", 2)
    small = words.Words()
    assert [lengths(small, t) for t in texts] == expected
    assert len(small._words) < 60


@pytest.mark.parametrize(
    "text", ["!" * 500_000, "a-" * 250_000, "a@" * 250_000, "." * 500_000, "http://" * 70_000, "x'" * 250_000, "1" * 500_000]
)
def test_hostile_text_takes_linear_time(text):
    start = time.process_time()
    for piece in (text, " ".join(text[i : i + LONGEST] for i in range(0, len(text) // 8, LONGEST))):
        words.Words().of(piece)
        words.sentences(piece)
    assert time.process_time() - start < 5
