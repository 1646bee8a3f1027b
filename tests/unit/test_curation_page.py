"""Tests the page of a dataset's making: its histograms have every document, thresholds are in the right places, and hostile texts
have no effect."""

import random
import re

import pytest
from heliostat.curation import tally
from heliostat.curation.stage import Document, Outcome
from heliostat.curation.stages.gopher_quality import GopherQuality
from heliostat.tracking.report import curation
from heliostat.tracking.report.svg import BARS, axis, histogram

from tests.seeds import every_seed

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>'\"&\x1b[2J\u202e"


@every_seed(20)
def test_values_are_in_the_bar_whose_ends_are_around_them(seed):
    rng = random.Random(seed)
    values = [
        tally.rounded(rng.choice([rng.random(), rng.randrange(9), 10 ** rng.uniform(0, 5)][: 1 + seed % 3])) for _ in range(300)
    ]
    limits = [rng.random(), rng.uniform(1, 100)][: seed % 3]
    found = axis(values, limits)
    assert 1 <= found.bars <= BARS + 1
    for a, b in zip(sorted(values), sorted(values)[1:], strict=False):
        assert 0 <= found.across(a) <= found.across(b) <= 1 and 0 <= found.bar(a) <= found.bar(b) < found.bars
    assert all(0 <= found.across(v) <= 1 for v in limits)
    marks = found.marks()
    assert marks == sorted(marks) and all(0 <= at <= 1 for at, _ in marks)


def test_every_document_is_in_a_bar_and_each_threshold_has_its_line():
    bins = {f"{v / 10}": [v, 20 - v] for v in range(21)} | {"inf": [5, 5], "nan": [1, 0]}
    drawn = histogram("words", bins, [0.5, 1.5])
    assert f"kept <b>{sum(range(21)):,}</b>" in drawn and f"dropped <b>{sum(range(21)):,}</b>" in drawn
    heights = [float(h) for h in re.findall(r'<rect class="ink[01]"[^>]*height="([\d.]+)%"', drawn)]
    assert len(heights) == 40 and sum(heights) == pytest.approx(21 * 20 / 20 * 100, rel=0.01)
    lines = [float(x) for x in re.findall(r'<line class="limit" x1="([\d.]+)%"', drawn)]
    assert lines == pytest.approx([100 * 5.5 / 21, 100 * 15.5 / 21], abs=0.1)
    assert histogram("none", {"nan": [1, 1]}, []) == ""
    assert 'class="limit"' in histogram("one value", {"0": [5, 0]}, [0.05])


def told() -> dict:
    """Returns a funnel as the engine counts it, for documents with hostile ids, texts, and columns."""
    stage, counts = GopherQuality(), {}
    for i in range(60):
        document, kept = Document(f"{EVIL}#{i}", EVIL * 20), i % 3 > 0
        outcome = Outcome(document if kept else None, "" if kept else "few_words", EVIL, {"words": 45.0 + i / 4}, {"masked": 1})
        tally.count(counts, "0 gopher_quality", stage, document, outcome, (100, 100 if kept else 0))
    stages = {"0 gopher_quality": counts["0 gopher_quality"] | {"thresholds": {"words": [50, 100_000]}, "what": stage.reasons,
                                                              "largest": [[7, EVIL]]}}  # fmt: skip
    read = tally.entry({}, "") | {"documents": 70, "kept": 60, "bytes": 6000, "kept_bytes": 6000, "dropped": {"empty": 10}}
    shard = tally.entry({}, "") | {"documents": 40, "kept": 40, "bytes": 4000, "kept_bytes": 4000, "counts": {"tokens": 1234}}
    return {
        "name": EVIL, "dataset": "/data/x", "digest": "ab" * 32, "shards": 1,
        "funnel": {"read": read, **stages, "finish": {"dropped": {}}, "shard": shard},
        "seconds": {"shard": 1.0, "read": 2.0, "0 gopher_quality": 7200.0}, "hour": 0.05, "currency": "USD", "recorded_every": 1,
        "columns": {"sampled": 70, "counts": {"domains": {EVIL: [3, 4]}}},
    }  # fmt: skip


def test_the_page_tells_the_funnel_and_nothing_from_documents_does_anything():
    page = curation.page(told())
    assert page.count("<script") == 1 and "<img" not in page and "\x1b" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert(1)" in page
    for words in (
        "70",
        "few_words",
        "20 dropped for few_words",
        "kept, and close to the limit of words",
        "0.10 USD",
        "1,234",
        "33.33%",
        "7,200.0",
    ):
        assert words in page, words
    assert page.index("0 gopher_quality</span>") < page.index("shard</span><span"), "in the funnel's order"
    assert len(page) < 300_000


def test_what_is_counted_of_columns():
    held = {"url": "https://user:x@Docs.Example.org:80/a", "date": "2021-03-01T00:00:00Z", "language": "en", "license": "MIT"}
    assert sorted(curation.facts(held)) == [
        ("domains", "docs.example.org"),
        ("languages", "en"),
        ("licenses", "MIT"),
        ("years", "2021"),
    ]
    for odd in ({"url": "http://[::1"}, {"date": "yesterday"}, {"url": None, "date": 7}, {}):
        assert curation.facts(odd) == []
