"""Tests spans of words that several documents share: they are found from a stated length, and one occurrence stays for any split
of the input."""

import random
import re
import unicodedata

import numpy as np
import pytest
from heliostat.curation import recording
from heliostat.curation.registry import parse
from heliostat.curation.repeated import WordWindows, least, spans

from tests.unit.build_curation import curate, left, left_out

STAGE = {"stage": "repeated_spans", "words": 20}
SIZE = 10
WORD = re.compile(r"\w+")


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghij", k=6)) for _ in range(count)]


def test_of_every_row_of_windows_the_least_is_chosen():
    found = np.random.default_rng(1).integers(0, 50, 1000).astype(np.uint64)
    wanted = sorted({i + int(np.argmin(found[i : i + 7])) for i in range(994)})
    assert least(found, 7).tolist() == wanted
    assert not len(least(found[:6], 7))
    for ordered in (np.sort(found), np.sort(found)[::-1]):
        assert least(ordered, 7).tolist() == sorted({i + int(np.argmin(ordered[i : i + 7])) for i in range(994)})


def test_windows_that_overlap_or_touch_are_one_span():
    assert spans({0, 4, 30, 40, 51}, 10) == [(0, 14), (30, 50), (51, 61)]


@pytest.mark.parametrize("length", [19, 20, 40])
def test_a_shared_span_of_the_stated_length_is_always_found(length):
    """At any place, between any words: two texts that share so many words choose a window that both have."""
    rng = random.Random(length)
    for _ in range(200):
        shared = words(rng, length)
        a, b = (" ".join(words(rng, rng.randrange(60)) + shared + words(rng, rng.randrange(60))) for _ in range(2))
        assert {h for _, h in WordWindows(SIZE).hashes(a)} & {h for _, h in WordWindows(SIZE).hashes(b)}


def make_texts(documents: int = 40) -> tuple[dict[str, str], str]:
    rng = random.Random(3)
    shared = " ".join(words(rng, 60))
    texts = {}
    for i in range(documents):
        before, after = (" ".join(words(rng, 30 + rng.randrange(50))) for _ in range(2))
        texts[f"d{i}"] = f"{before}.\n{shared}, {after}" if i % 2 else f"{before} {after}"
    return texts, shared


@pytest.mark.parametrize("memory_limit", [1 << 20, 60_000], ids=["roomy", "tight"])
def test_one_occurrence_stays_and_little_of_the_others(tmp_path, memory_limit):
    texts, shared = make_texts()
    wanted = None
    for seed, pieces in ((0, 1), (1, 9)):
        found, here = curate(tmp_path / str(seed), texts, [STAGE], pieces, memory_limit, seed=seed)
        kept = left(found, here)
        assert wanted in (None, kept)
        wanted = kept
    whole = [id for id, text in kept.items() if shared in text]
    assert whole == [min((id for id in texts if shared in texts[id]), key=recording.key_of)]
    taken = set(WORD.findall(shared))
    for id, text in kept.items():
        if id in whole or shared not in texts[id]:
            assert text == texts[id]
            continue
        over = [word for word in WORD.findall(text) if word in taken]
        assert len(over) <= 2 * (SIZE - 1), "less than half of `words` stays at either end"
        own = [word for word in WORD.findall(texts[id]) if word not in taken]
        assert [word for word in WORD.findall(text) if word not in taken] == own, "nothing of its own goes"
    assert not left_out(found, here) and found.runs


def test_every_window_of_the_input_is_somewhere_in_the_output_unless_a_cut_goes_through_it(tmp_path):
    """For chains of documents that overlap, no text disappears from the whole set."""
    rng = random.Random(5)
    line = words(rng, 900)
    texts = {f"d{i}": " ".join(line[i * 45 : i * 45 + 120]) for i in range(18)}
    found, here = curate(tmp_path / "work", texts, [STAGE])
    kept = left(found, here)
    there = {word for text in kept.values() for word in WORD.findall(text)}
    assert there == {word for text in texts.values() for word in WORD.findall(text)}
    before, after = (sum(len(WORD.findall(t)) for t in some.values()) for some in (texts, kept))
    assert after < 0.7 * before


def test_other_scripts_repeats_within_a_document_and_what_is_dropped(tmp_path):
    cjk = "".join(chr(0x4E00 + i) for i in range(70))
    rng = random.Random(6)
    own = " ".join(words(rng, 40))
    texts = {"a": cjk + "\u3002" + own, "b": cjk, "c": f"{own} Été! {own}"}
    found, here = curate(tmp_path / "work", texts, [STAGE])
    kept, gone = left(found, here), left_out(found, here)
    assert sum(cjk in text for text in kept.values()) == 1 and sum(text.count(own) for text in kept.values()) == 1
    assert all("\n\n" not in text for text in kept.values())
    dropped, _ = curate(tmp_path / "more", texts, [STAGE | {"max_removed_words": 0.1}])
    assert set(gone) <= {"b"} and dropped.reasons["0 repeated_spans: repeated"] >= 1


def test_texts_that_are_shorter_than_the_span_are_let_be(tmp_path):
    rng = random.Random(7)
    short = " ".join(words(rng, 18))
    found, here = curate(tmp_path / "work", {"a": short, "b": short, "c": "", "d": "!?"}, [STAGE])
    assert left(found, here) == {"a": short, "b": short, "c": "", "d": "!?"}
    assert parse(STAGE).signing() == WordWindows(10)
    with pytest.raises(ValueError, match="words"):
        parse(STAGE | {"words": 5})


def test_a_span_is_found_in_any_form_of_unicode_and_cut_where_it_is(tmp_path):
    """Accents as separate marks, capitals, and other numbers; and Chinese, whose characters are words."""
    rng = random.Random(8)
    shared = " ".join(f"{word}\u00e9 {number}" for number, word in enumerate(words(rng, 30)))
    own = [" ".join(words(rng, 30)) for _ in range(4)]
    written = [shared, unicodedata.normalize("NFD", shared), shared.upper(), re.sub("[0-9]+", "77", shared)]
    texts = {f"d{i}": f"{a}. {b}" for i, (a, b) in enumerate(zip(own, written, strict=True))}
    found, here = curate(tmp_path / "work", texts, [STAGE])
    kept = left(found, here)
    whole = min(texts, key=recording.key_of)
    assert kept[whole] == texts[whole]
    for id, before in zip(texts, own, strict=True):
        assert kept[id].startswith(before)
        assert id == whole or len(kept[id]) < len(before) + 2 * SIZE * 10
