"""Tests lines and paragraphs that several documents share: one occurrence stays, the same for any split of the input."""

import random
import unicodedata

import pytest
from heliostat.curation import recording, repeated, segment
from heliostat.curation.registry import parse
from heliostat.curation.repeated import ComparedParts
from heliostat.curation.stage import Document, Dropped

from tests.unit.build_curation import Given, KilledError, curate, left, left_out
from tests.unit.test_comparable import reference

MENU, NOTICE = "Home | About us | Contact us", "All rights reserved, 2021. Do not copy!"
STAGE = {"stage": "repeated_lines"}


def make_texts(documents: int = 60) -> dict[str, str]:
    """Returns documents with their own lines between a menu and a notice with another year each. Every fifth document has only
    these."""
    rng, texts = random.Random(0), {}
    for i in range(documents):
        own = [" ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(7)) for _ in range(0 if i % 5 == 4 else 4)]
        texts[f"d{i}"] = "\n".join([MENU, *own, f"all rights reserved 20{i:02d} do not copy", "Next"])
    return texts


def plainly(texts: dict[str, str], parts: ComparedParts) -> dict[str, str]:
    """Computes the same in memory, document by document, in the order of their ids' hashes."""
    seen, found = set[str](), {}
    between = repeated.BETWEEN[parts.unit]
    for id in sorted(texts, key=recording.key_of):
        kept = []
        for part in texts[id].split(between):
            words = reference(part)
            told = " ".join(words if parts.normalise else part.split())
            if len(words) < parts.min_words or told not in seen:
                kept.append(part)
            if len(words) >= parts.min_words:
                seen.add(told)
        if between.join(kept).strip():
            found[id] = between.join(kept)
    return found


@pytest.mark.parametrize("memory_limit", [1 << 20, 12_000], ids=["roomy", "tight"])
def test_one_occurrence_of_each_line_stays(tmp_path, memory_limit):
    """For any split, order of tasks, and memory, the result equals that in memory, one document after another."""
    texts, wanted = make_texts(), None
    for seed, pieces in ((0, 1), (1, 7), (2, 30)):
        found, here = curate(tmp_path / f"{seed}", texts, [STAGE], pieces, memory_limit, seed=seed)
        kept, gone = left(found, here), left_out(found, here)
        assert kept == plainly(texts, ComparedParts("line", 3, True))
        assert sum(MENU in text for text in kept.values()) == sum("rights" in text for text in kept.values()) == 1
        assert set(kept) | set(gone) == set(texts) and not set(kept) & set(gone)
        assert wanted in (None, (kept, gone, found.reasons))
        wanted = kept, gone, found.reasons
        assert here.done.get("repeated-0-choose", 0) > (memory_limit < 1 << 20)
    assert all(text.endswith("Next") for text in kept.values()), "a line of one word is no line that says something"


def test_what_is_dropped_has_a_reason_and_the_funnel_counts_it(tmp_path):
    again = "the same line twice over"
    texts = make_texts() | {"half": f"first line of its own here\n{again}\n{again}"}
    stage = STAGE | {"max_removed_words": 0.5}
    found, here = curate(tmp_path / "work", texts, [stage])
    gone = left_out(found, here)
    told = {}
    for name in found.tallies:
        for label, part in segment.load(here.work.spill, name).items():
            told.setdefault(label, []).append(part)
    parts = told["0 repeated_lines"]
    assert sum(p["documents"] for p in parts) == len(texts) and sum(p["seconds"] for p in parts) > 0
    assert sum(p["kept"] for p in parts) == len(left(found, here)) == len(texts) - len(gone)
    assert {reason for _, reason, _ in gone.values()} == {"repeated"}, "all but `Next` is repeated"
    assert sum(p["dropped"].get("repeated", 0) for p in parts) == len(gone) > 5
    assert gone[next(i for i in gone if i != "d4")][2] == "2 of 3 lines"
    assert sum(p["counts"]["lines_removed"] for p in parts if p["counts"]) == 2 * 59 + 1
    kept_bytes = sum(p["kept_bytes"] for p in parts)
    assert kept_bytes == sum(len(t) for t in left(found, here).values()) < sum(p["bytes"] for p in parts)


def test_paragraphs(tmp_path):
    shared = "A paragraph that\nmany documents have."
    texts = {f"d{i}": f"own paragraph number x{i}y here\n\n{shared}\n\n\n{shared}" for i in range(9)}
    found, here = curate(tmp_path / "work", texts, [STAGE | {"unit": "paragraph", "normalise": False}])
    assert left(found, here) == plainly(texts, ComparedParts("paragraph", 3, False))
    assert sum(shared in text for text in left(found, here).values()) == 1


def test_the_columns_and_what_comes_behind_see_the_new_text(tmp_path):
    texts = make_texts(20)
    columns = {id: {"url": f"http://{id}"} for id in texts}
    found, here = curate(tmp_path / "work", texts, [STAGE, {"stage": "length", "min_words": 10}], columns=columns)
    stages = {stage for stage, _, _ in left_out(found, here).values()}
    assert stages == {"1 length"}, "a document of `Next` alone is short by then"
    rows = [r for run in found.runs for t in segment.survivors(here.work.spill, run) for r in t.to_pylist()]
    assert rows and all(r["columns"] == f'{{"url": "http://{r["id"]}"}}' and r["bytes"] == len(r["text"]) for r in rows)


def test_a_run_that_ends_after_any_task_goes_on_and_a_threshold_redoes_the_removal_alone(tmp_path):
    texts = make_texts()
    whole, here = curate(tmp_path / "whole", texts, [STAGE])
    for seed in range(4):
        with pytest.raises(KilledError):
            curate(tmp_path / "cut", texts, [STAGE], most=1, seed=seed)
    found, again = curate(tmp_path / "cut", texts, [STAGE])
    assert left(found, again) == left(whole, here) and len(again.ran) < len(here.ran)
    _, other = curate(tmp_path / "whole", texts, [STAGE | {"max_removed_words": 0.2}])
    assert set(other.ran) == {"repeated-0-remove"}


def test_lines_of_any_script_are_compared_and_tables_as_they_are_written(tmp_path):
    """Chinese characters are words, an accent may be a separate mark, and different rows of numbers aren't duplicates."""
    menu = ["关于我们 联系方式", "Télécharger la dernière édition", "हमारे बारे में जानें"]
    texts = {}
    for i, name in enumerate(["one", "two", "three", "four"]):
        lines = [f"own line of document {name}", *menu, f"{i} | {i + 40} | {i * 7}"]
        texts[f"d{i}"] = unicodedata.normalize(("NFC", "NFD")[i % 2], "\n".join(lines))
    found, here = curate(tmp_path / "work", texts, [STAGE])
    kept = left(found, here)
    lines = sorted(line for text in kept.values() for line in text.split("\n"))
    assert len(lines) == len(set(lines)) == 2 * len(texts) + len(menu)


@pytest.mark.parametrize("entry", [{"unit": "sentence"}, {"min_words": 0}, {"max_removed_words": 1.5}])
def test_what_it_cannot_be_is_refused(entry):
    with pytest.raises(ValueError, match="repeated_lines"):
        parse(STAGE | entry)


def test_a_line_in_every_document_is_a_row_of_each_run_to_one_task(tmp_path, monkeypatch):
    """Otherwise the task with this line would take as much memory and time as the line has occurrences."""
    rows, divided, runs = list[int](), repeated._divided, 16

    def seen(table):
        rows.extend([len(table)] if "node" in table.column_names else [])
        return divided(table)

    monkeypatch.setattr(repeated, "_divided", seen)
    texts = {f"d{i}": "the line that they all have\n" * 3 + "and one of its own" for i in range(800)}
    found, here = curate(tmp_path / "work", texts, [STAGE], runs)
    assert left(found, here) == plainly(texts, ComparedParts("line", 3, True)) and len(left(found, here)) == 1
    assert rows and max(rows) == 2 * runs


def bounded(self: Given, document: Document) -> Document | Dropped:
    """Finishes a document like a text pipeline with `min_chars: 60`."""
    return document if len(document.text) >= 60 else Dropped(document.id, "too_short")


@pytest.mark.parametrize("stage", [STAGE, {"stage": "repeated_spans", "words": 20}], ids=["lines", "spans"])
def test_a_text_that_is_cut_below_the_least_length_is_left_out_and_counted(tmp_path, monkeypatch, stage):
    """Like a text that is too short when it is read. An unchanged text was checked before."""
    monkeypatch.setattr(Given, "finish", bounded)
    shared = " ".join(f"w{chr(97 + i)}{chr(98 + i)}" for i in range(24))
    texts = {f"d{i}": f"{shared}\nits own {'abcdefgh'[i]} line" for i in range(8)} | {"alone": "long enough " * 9}
    found, here = curate(tmp_path / "work", texts, [stage])
    kept, gone = left(found, here), left_out(found, here)
    assert len(kept) == 2 and "alone" in kept and min(map(len, kept.values())) >= 60
    assert set(gone.values()) == {("finish", "too_short", f"after 0 {stage['stage']}")} and len(gone) == 7
    tallies = [segment.load(here.work.spill, name) for name in found.tallies]
    assert sum(t["finish"]["dropped"]["too_short"] for t in tallies if "finish" in t) == found.reasons["too_short"] == 7
