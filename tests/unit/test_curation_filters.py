"""Tests that filters follow their papers: a document on either side of each limit, in any batch."""

import hashlib
import importlib
import json
import pkgutil
import random
import time
from typing import ClassVar

import pytest
from heliostat import extras
from heliostat.curation import stages
from heliostat.curation.images.making import ImageMaking
from heliostat.curation.stage import Document, Stage
from heliostat.curation.stages import code
from heliostat.curation.stages.bad_words import BadWords
from heliostat.curation.stages.c4 import C4
from heliostat.curation.stages.code import Code
from heliostat.curation.stages.fineweb import FineWeb
from heliostat.curation.stages.gopher_quality import GopherQuality
from heliostat.curation.stages.gopher_repetition import GopherRepetition
from heliostat.curation.stages.image_size import ImageSize
from heliostat.curation.stages.length import Length
from heliostat.curation.stages.lines import Lines
from heliostat.curation.stages.urls import Urls
from heliostat.errors import ConfigError, MissingExtraError
from pydantic import ValidationError

from tests.seeds import every_seed

PROSE = (
    "The old lighthouse keeper walked down to the harbour every morning before the sun had risen. He carried a lamp and a rope, "
    "and he would wait for the first boats to return with their nets. Nobody in the village could remember a time when he had "
    "not been there. Some said that the sea itself would stop if he ever failed to come. Children were told to greet him well!"
)


def reason(stage, text, **columns):
    (outcome,) = stage.open()([Document("a", text, columns)])
    assert (outcome.document is None) == bool(outcome.reason)
    assert not outcome.reason or outcome.reason in stage.reasons
    return outcome.reason


def vocabulary(count, draw):
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, ""),
        ("", "empty"),
        (" \n ", "empty"),
        (" ".join(PROSE.split()[:40]), "few_words"),
        ("a b " * 60 + "the of", "short_words"),
        ("the of " + "pneumonoultramicroscopic " * 60, "long_words"),
        (PROSE + " #" * 10, "hashes"),
        (PROSE + " ..." * 10, "ellipses"),
        ("- " + PROSE.replace(". ", ".\n- "), "bullets"),
        (PROSE.replace(". ", "…\n").replace("\n", "\n" + "word " * 30), "ellipsis_lines"),
        (PROSE + " 1989" * 40, "few_letters"),
        ("Lorem ipsum dolor sit amet consectetur " * 12, "few_stop_words"),
    ],
)
def test_gopher_quality(text, expected):
    assert reason(GopherQuality(), text) == expected


def test_marks_are_counted_as_words_without_letters_unless_asked_not_to():
    """The default is datatrove's. A dataset from before this key is up to date."""
    listing = ", ".join(word for word in PROSE.replace(",", "").split()) + " of the"
    assert reason(GopherQuality(), listing) == "few_letters" and reason(GopherQuality(marks_are_words=False), listing) == ""
    assert reason(GopherQuality(marks_are_words=False), "the of " + "1989 word " * 40) == "few_letters"
    assert GopherQuality(marks_are_words=False, min_words=0, min_word_length=0).judge("... !!!")[0] == "ellipses"
    assert "marks_are_words" not in GopherQuality().identity() and GopherQuality().identity()["version"] == 1
    assert GopherQuality(marks_are_words=False).identity()["marks_are_words"] is False


def test_gopher_counts_words_as_spacy_does():
    stage = GopherQuality(min_words=8, min_stop_words=0)
    assert stage.judge("Don't you e.g. see 5km/h (well-known)?")[1]["words"] == len(
        ["Do", "n't", "you", "e.g.", "see", "5km", "h", "well", "known"]
    )


def test_gopher_repetition_finds_lines_paragraphs_and_n_grams():
    draw = random.Random(0)
    words = vocabulary(3000, draw)
    assert reason(GopherRepetition(), " ".join(words)) == ""
    assert reason(GopherRepetition(), "\n\n".join(["one paragraph"] * 2 + ["another"])) == "paragraphs"
    assert reason(GopherRepetition(), "\n".join(["a line of text"] * 2 + [" ".join(words[:20])])) == "lines"
    assert (
        reason(GopherRepetition(), " ".join(w for pair in zip(words, ["very good"] * 300, strict=False) for w in pair))
        == "top_2_grams"
    )
    assert reason(GopherRepetition(), " ".join(words[:40] + words[100:140] + words[:40] + words[200:290])) == "5_grams"
    assert reason(GopherRepetition(), "") == "empty"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, ""),
        ("Two sentences. Only two here.", "few_sentences"),
        ("\n".join([PROSE, "A line with a { in it."]), "curly_bracket"),
        ("\n".join([PROSE, "Lorem ipsum dolor sit amet."]), "lorem_ipsum"),
        ("", "few_sentences"),
    ],
)
def test_c4(text, expected):
    assert reason(C4(), text) == expected


def test_c4_removes_lines_and_marks_and_counts_them():
    lines = [PROSE, "no mark at the end", "Too short.", "We use cookies on this site.", "Please enable Javascript to go on.",
             "It was so [1] in the year [citation needed] of his birth.", "It goes on and on ...",
             f"{'x' * 1001} is a word."]  # fmt: skip
    (outcome,) = C4().open()([Document("a", "\n".join(lines))])
    assert outcome.document.text == f"{PROSE}\nIt was so  in the year  of his birth."
    assert outcome.counts == {"lines_without_terminal_mark": 2, "short_lines": 1, "policy_lines": 1, "javascript_lines": 1,
                              "lines_of_long_words": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, ""),
        ("\n \n", "empty"),
        (
            "\n".join(
                ["a long enough line without any mark at its end"] * 1 + ["another line that has none either, as it is"] * 1
            ),
            "few_terminal_marks",
        ),
        ("\n".join([PROSE, "Short one.", "Short two.", "Short three."]), "short_lines"),
        ("\n".join([PROSE, PROSE]), "duplicate_chars"),
        ("\n".join(w + "." * (i % 2) for i, w in enumerate("abcdefghijklmnopqrstuvwxyz")), "short_lines"),
    ],
)
def test_fineweb(text, expected):
    assert reason(FineWeb(), text) == expected
    assert reason(FineWeb(max_short_lines=1.0), "\n".join(w + "." for w in "abcdefghijklmnopqrstuvwxyz")) == "line_ends"


def test_lines():
    lines = [
        "Read on and sign in",
        "Sign in to comment",
        "3 likes",
        "1,024 * 2",
        "Home",
        "ALL OF THIS IS LOUD",
        "We read more...",
        PROSE,
    ]
    (outcome,) = Lines(max_removed_words=0.5).open()([Document("a", "\n".join(lines))])
    assert outcome.document.text == f"Read on and sign in\n{PROSE}"
    assert outcome.counts == {
        "boilerplate_lines": 2,
        "counters": 1,
        "lines_of_numbers": 1,
        "lines_of_one_word": 1,
        "lines_of_capitals": 1,
    }
    assert reason(Lines(), "\n".join(lines)) == "removed_words"
    capitals = Lines(begins=["Sign In"], ends=["MORE..."], holds=["Cookies"], max_removed_words=1.0, max_capitals=1.0)
    (outcome,) = capitals.open()([Document("a", f"sign in now\nread more...\nall the cookies here\n{PROSE}")])
    assert outcome.document.text == PROSE and outcome.counts == {"boilerplate_lines": 3}
    assert reason(Lines(max_removed_words=1.0), "Home\n\n12") == "empty"


def test_bad_words_are_whole_words_and_phrases_whatever_the_case(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# a comment\nfoo\nBar baz\nc++\n")
    stage = BadWords(lists=[str(path)])
    for text in ("A FOO.", "the bar baz!", "in c++, too", "foo_bar foo"):
        assert reason(stage, text) == "bad_word", text
    for text in ("food", "bar  baz", "abc++", "foo_bar", ""):
        assert reason(stage, text) == "", text
    assert reason(BadWords(lists=[str(path)], whole_words=False), "seafood") == "bad_word"
    assert reason(BadWords(lists=[str(path)], max_found=1), "foo") == ""
    assert stage.identity()["lists"] != BadWords(lists=[str(path)], max_found=1).identity()["lists"] or stage.identity() != {}
    before = stage.identity()
    path.write_text("other\n")
    assert stage.identity() != before
    with pytest.raises(ConfigError, match=r"lists: can't read '/none' \(No such file or directory\)\. Use a file"):
        BadWords(lists=["/none"]).check()


def test_urls(tmp_path):
    for name, entries in {
        "domains": "bad.example\n",
        "urls": "http://www.good.example/this/\n",
        "words": "casino\n",
        "soft": "free\nwin\n",
    }.items():
        (tmp_path / name).write_text(entries)
    stage = Urls(domains=[str(tmp_path / "domains")], urls=[str(tmp_path / "urls")], words=[str(tmp_path / "words")],
                 soft_words=[str(tmp_path / "soft")])  # fmt: skip
    for url, expected in {
        "https://a.BAD.example:80/x": "domain", "http://notbad.example/": "", "https://good.example/this": "url",
        "https://good.example/other": "", "https://x.example/casino-royal": "word", "https://x.example/casinos": "",
        "https://x.example/free/win": "soft_words", "https://x.example/free": "", "http://[broken": "",
    }.items():  # fmt: skip
        assert reason(stage, "text", url=url) == expected, url
    assert reason(stage, "text") == "" and reason(Urls(required=True), "text") == "no_url"


def test_length():
    assert reason(Length(min_words=3), "one two") == "short" and reason(Length(min_words=2), "one two") == ""
    assert reason(Length(max_bytes=3), "ää") == "long" and reason(Length(max_chars=3), "ää") == ""
    assert reason(Length(max_lines=1), "a\nb") == "long" and reason(Length(max_lines=1), "a\n") == ""
    with pytest.raises(ValidationError, match="at least one limit, such"):
        Length()
    with pytest.raises(ValidationError, match="min_chars 5 is above max_chars 3"):
        Length(min_chars=5, max_chars=3)


def test_a_stage_of_a_user_may_have_other_values_than_numbers_in_its_keys():
    """The rule that a minimum isn't above the maximum is for numbers."""

    class Dated(Stage):
        min_date: str = "2020-01-01"
        max_date: str | None = "1999-01-01"
        min_parts: list[int] = [1]
        max_parts: int = 3

    assert Dated().min_date == "2020-01-01"


SOURCE = "def add(first, second):\n    return first + second\n" * 5


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.py", SOURCE, ""),
        ("a.py", "", "empty"),
        ("web/node_modules/x/a.js", SOURCE, "vendored"),
        ("a_pb2.py", SOURCE, "generated"),
        ("a.go", "// Code generated by protoc. DO NOT EDIT.\n" + SOURCE, "generated"),
        ("a.min.js", SOURCE, "minified"),
        ("a.py", "x = 1\n" * 100_001, "many_lines"),
        ("a.py", "x = '" + "word " * 150 + "'\n", "long_lines"),
        ("a.py", SOURCE * 40 + "x = '" + "word " * 250 + "'\n", "long_line"),
        ("a.md", "word " * 250, ""),
        ("a.py", "{}[]();:" * 10 + "\n" + "ab", "few_letters"),
        ("a.py", SOURCE * 20 + "\n".join(["QUJD" * 20] * 20), "encoded"),
        ("a.xml", '<?xml version="1.0"?>\n<a>some words in it</a>', "xml"),
        ("a.json", '{"name": "value"}\n' * 513, "data"),
        ("a.html", "<div class='wide'><span id='a'></span></div>\n" * 20 + "few words", "invisible"),
    ],
)
def test_code(path, text, expected):
    assert reason(Code(), text, path=path) == expected


@every_seed(30)
def test_runs_of_encoded_data_are_the_matches_of_the_pattern(seed):
    draw = random.Random(seed)
    pieces = ["ab", "\n", "/", "==", " ", "0x1f, ", "1f ", "\\u00e9", "\\x1f", "?", "é", ".", "x", "\\", "1f,\n", "Zz9+" * 8]
    text = "".join(draw.choice(pieces) * draw.choice([1, 1, 3, 8, 20]) for _ in range(40))
    assert code._encoded(text) == [match.end() - match.start() for match in code._ENCODED.finditer(text)]


def test_code_tells_the_language():
    for path, text, language in (
        ("x/a.rs", SOURCE, "Rust"),
        ("run", "#!/usr/bin/env python3\n" + SOURCE, "Python"),
        ("Makefile", SOURCE, "Makefile"),
    ):
        (outcome,) = Code().open()([Document(f"{path}#1", text, {"path": path})])
        assert outcome.document.columns["language"] == language
    assert reason(Code(languages=["C"]), SOURCE, path="a.py") == "other_language"


@pytest.mark.parametrize(
    "stage",
    [GopherQuality(), GopherRepetition(), C4(), FineWeb(), Lines(), Code(), Length(min_words=50)],
    ids=lambda s: type(s).__name__,
)
def test_an_outcome_does_not_depend_on_the_batch_or_on_what_came_before(stage):
    draw = random.Random(1)
    texts = [
        " ".join(draw.choices(PROSE.split(), k=draw.randint(0, 200))).replace(". ", ".\n" * draw.randint(0, 2)) for _ in range(60)
    ]

    def decide(order, size):
        work, out = stage.open(), {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            outcomes = work([Document(str(i), texts[i]) for i in chosen])
            assert len(outcomes) == len(chosen)
            out |= {i: (o.reason, o.measures, o.document and o.document.text) for i, o in zip(chosen, outcomes, strict=True)}
        return out

    order = list(range(len(texts)))
    first = decide(order, 60)
    draw.shuffle(order)
    assert decide(order, 1) == first == decide(order, 7)
    assert {bool(o[0]) for o in first.values()} == {True, False}


HOSTILE = ["." * 100_000 + "x", "1, " * 30_000 + "likes", "charset=" + " " * 100_000, "ab " * 30_000, "ab," * 6 + "0x" * 50_000,
           "\\u00e" * 20_000, "<" * 100_000, "[" * 100_000, "a\n" * 50_000, "\n" * 100_000, "#! /" + "/" * 100_000,
           "A" * 100_000]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:6]))
def test_hostile_text_takes_linear_time(text, tmp_path):
    (tmp_path / "list").write_text("a\nab ab\n...\n")
    listed = [str(tmp_path / "list")]
    stages = [GopherQuality(), GopherRepetition(), C4(), FineWeb(), Lines(), Code(), Length(min_words=1), BadWords(lists=listed),
              Urls(words=listed)]  # fmt: skip
    for stage in stages:
        work = stage.open()
        start = time.process_time()
        work([Document("a", text, {"url": text, "path": text}), Document("b", f"4 {text}", {"url": f"http://{text}/"})])
        assert time.process_time() - start < 4, type(stage).__name__


def test_a_node_without_a_library_is_told_so_and_drops_nothing(monkeypatch):
    """Without the library that decodes images, `image_size` would report every image as damaged."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="stage image_size"):
        ImageSize().open()


def test_stages_of_users_that_were_written_for_an_earlier_version_still_work(tmp_path):
    """They import the helpers from the earlier module, and add digests of the files in their keys to their identity."""
    from heliostat.curation.files import digests
    from heliostat.curation.filtering import by_text, first_failed

    class Banned(Stage):
        words: list[str] = []
        reasons: ClassVar[dict[str, str]] = {"banned": "a word of `words`"}

        def identity(self) -> dict[str, object]:
            return digests(super().identity(), self, "words")

        def open(self):
            return by_text(lambda text: (first_failed(("bad" in text, "banned")), {}))

    (tmp_path / "words.txt").write_text("bad\n")
    stage = Banned(words=[str(tmp_path / "words.txt")])
    assert stage.identity()["words"] == [hashlib.sha256(b"bad\n").hexdigest()]
    assert (reason(stage, "a bad one"), reason(stage, "a good one")) == ("banned", "")


def test_a_stage_without_a_function_is_named_before_any_document(tmp_path):
    class Undefined(Stage):
        def decides(self, document):
            return None

    with pytest.raises(ConfigError, match="Undefined doesn't define `decide`"):
        Undefined().open()


def test_what_reasons_mean_is_as_in_datasets_of_older_versions():
    """A dataset's digest depends on these words. Other words would make another dataset of the same documents."""
    modules = [importlib.import_module(f"{stages.__name__}.{one.name}") for one in pkgutil.iter_modules(stages.__path__)]
    made = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Stage)]
    meanings = {kind.named(): kind.reasons for kind in made if kind.__module__.startswith(stages.__name__)}
    words = json.dumps([meanings, ImageMaking.meanings], sort_keys=True)
    assert len(meanings) > 20 and hashlib.sha256(words.encode()).hexdigest()[:16] == "82b3f15a86bdb297"
