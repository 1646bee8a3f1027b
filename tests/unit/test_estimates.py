"""Tests estimates for a whole input from a sample: duplicates, tokens, and shares, each with bounds."""

from collections import Counter

import numpy as np
import pytest
from heliostat.curation import estimates, prediction
from heliostat.curation.pieces import FilePart
from heliostat.curation.predicting import rows_of
from heliostat.curation.sampled import SampledParts
from heliostat.curation.text import rates
from heliostat.errors import ConfigError


def planted(kind: str, rng: np.random.Generator, documents: int) -> np.ndarray:
    """Returns the sizes of the clusters of so many documents, including single documents."""
    draw = {
        "none": lambda n: np.ones(n),
        "pairs": lambda n: np.where(rng.random(n) < 0.3, 2, 1),
        "sixes": lambda n: np.where(rng.random(n) < 0.1, 6, 1),
        "versions": lambda n: np.where(rng.random(n) < 0.6, rng.integers(2, 9, n), 1),
        "geometric": lambda n: rng.geometric(0.4, n),
        "heavy tail": lambda n: np.minimum(rng.zipf(2.2, n), documents // 50),
        "boilerplate": lambda n: np.concatenate([[documents // 20], np.where(rng.random(n) < 0.1, 2, 1)]),
    }
    sizes = draw[kind](documents).astype(np.int64)
    return sizes[np.cumsum(sizes) <= documents]


@pytest.mark.parametrize(("documents", "share", "most"), [(20_000, 0.3, 0.06), (20_000, 0.1, 0.2), (10**6, 0.01, 0.26)])
@pytest.mark.parametrize("kind", ["none", "pairs", "sixes", "versions", "geometric", "heavy tail", "boilerplate"])
def test_duplicates_of_a_whole_are_estimated_from_the_few_of_a_sample(kind, documents, share, most):
    """The estimate of the documents that stay is right in the mean of five samples, and within the bounds of each."""
    rng, off = np.random.default_rng(0), list[float]()
    sizes = planted(kind, rng, documents)
    for _ in range(5):
        drawn = rng.binomial(sizes, share)
        shown, counts = np.unique(drawn[drawn > 1], return_counts=True)
        seen = dict(zip(shown.tolist(), counts.tolist(), strict=True))
        found = estimates.duplicates(int(drawn.sum()), seen, float(sizes.sum() / drawn.sum()))
        truly = 1 - len(sizes) / sizes.sum()
        assert found.low <= truly <= found.high and found.low <= found.expected <= found.high
        off.append((1 - found.expected) / (1 - truly) - 1)
    assert abs(sum(off) / len(off)) < most


@pytest.mark.parametrize(("drawn", "rate"), [(0.1, 1.0), (0.2, 0.5), (1.0, 0.2)])
def test_neighbours_that_are_alike_are_not_taken_for_the_few_that_a_sample_shows(drawn, rate):
    """The sample draws some of 4,000 places, and a share of their documents. A fifth of the documents have a copy next to them, a
    tenth elsewhere."""
    rng, off, naive = np.random.default_rng(1), list[float](), list[float]()
    clusters = np.arange(4000 * 10).reshape(4000, 10)
    elsewhere = rng.random(clusters.shape) < 0.1
    clusters[elsewhere] = rng.permutation(clusters[elsewhere]) // 2 * 2  # pairs of what was drawn, somewhere
    beside = rng.random(clusters.shape) < 0.2
    places = [np.concatenate([row, row[mask]]) for row, mask in zip(clusters, beside, strict=True)]
    documents = sum(map(len, places))
    truly = 1 - len(np.unique(clusters)) / documents
    for _ in range(5):
        shown = [row[rng.random(len(row)) < rate] for row in places if rng.random() < drawn]
        pairs = Counter((int(cluster), place) for place, row in enumerate(shown) for cluster in row)
        groups, wide = Counter(pairs.values()), Counter(Counter(cluster for cluster, _ in pairs).values())
        whole = Counter(Counter(cluster for row in shown for cluster in row.tolist()).values())
        for counts in (groups, wide, whole):
            counts.pop(1, None)
        count = sum(map(len, shown))
        found = estimates.duplicates_by_place(count, groups, wide, rate, documents / count)
        assert found.low <= truly <= found.high and found.low <= found.expected <= found.high
        off.append((1 - found.expected) / (1 - truly) - 1)
        naive.append((1 - estimates.duplicates(count, whole, documents / count).expected) / (1 - truly) - 1)
    assert abs(sum(off) / len(off)) < 0.06
    assert rate < 0.5 or abs(sum(naive) / len(naive)) > 0.15, "what taking them for drawn one by one would say"


@pytest.mark.parametrize("documents", [10**4, 10**6])
def test_few_duplicates_are_expected_where_a_large_sample_shows_none(documents):
    """This holds for any small share. The bound is the number of pairs that the sample could have missed, not the start of the
    search for sizes."""
    for times in (20, 1000):
        found = estimates.duplicates(documents, {}, times)
        assert found.low == 0 <= found.expected <= found.high <= 4 * times / documents
    assert estimates.duplicates(10**6, {}, 1000).high < 0.005


def test_bounds_of_documents_are_none_below_zero():
    """In this case so little was read that the error of the number is larger than the number."""
    part = {"documents": 2, "kept": 2, "bytes": 200, "kept_bytes": 200, "dropped": {}, "counts": {}}
    sample = SampledParts(0.001)
    many, few = [FilePart(f"{i}", 100, 0) for i in range(1000)], [FilePart("0", 100, 0)]
    sample.add("files", many, few, False, 0.5)
    rows = rows_of({"read": part, "shard": part}, sample, [{"read": 1.0, "shard": 1.0, "": 1.0}] * 3, None)
    assert sample.unknown * estimates.Z * (0.999 / 2) ** 0.5 > 1, "what this test is of"
    assert all(0 <= row["kept_low"] <= row["kept"] <= row["kept_high"] for row in rows)


def test_intervals_of_shares():
    assert estimates.wilson(0, 0) == (0, 1)
    low, high = estimates.wilson(50, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    assert estimates.wilson(0, 100)[0] == 0 and 0.03 < estimates.wilson(0, 100)[1] < 0.04
    assert estimates.duplicates(100, {}, 1000).high > 0.5, "no duplicates among few say nothing"
    assert estimates.duplicates(100, {4: 10}, 1).expected == 0.3
    assert estimates.duplicates(0, {}, 10) == estimates.DuplicateShare(0, 0, 0, 0)


@pytest.mark.parametrize(("given", "share"), [("0.1%", 0.001), ("0.01", 0.01), (" 5 %", 0.05), (".5", 0.5)])
def test_shares_as_people_write_them(given, share):
    assert prediction.fraction(given) == pytest.approx(share)


@pytest.mark.parametrize("given", ["", "0", "1", "100%", "-1%", "ten", "nan", "inf", "1%%"])
def test_what_is_no_share_is_refused(given):
    with pytest.raises(ConfigError, match=r"--sample.*0\.1%"):
        prediction.fraction(given)


def test_rates_of_tokens():
    measured = {"own": 0.20, "other": 0.30, "trained": 50.0}
    whole = rates.of_whole(0.22, 100, measured, 1 << 40, 1e6)
    assert 0.22 < whole.expected < 0.25 and whole.low == 0.22 and whole.high == pytest.approx(0.22 + 0.025 + 0.05)
    assert rates.of_whole(0.22, 100, measured, 1 << 40, 100).expected == pytest.approx(0.22), "the sample is the whole"
    given = rates.of_whole(0.22, 1000, measured, 50, 1e6)
    assert given.expected == pytest.approx(0.22 + 0.05 * (1 - 1e-4) - 0.05 * 0.9), "most text of both trained nothing"
    assert rates.of_whole(0.22, 100, {"own": None, "other": 0.3, "trained": 0}, 10, 1000) == rates.Rate(0.22, 0.22, 0.22)


def test_the_share_that_would_be_enough_is():
    """Sums over documents of very different sizes, drawn one by one: at the reported share, most samples are near the sum."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 1.0, 4000)
    spread = ((1 - 0.05) * (sizes[rng.random(4000) < 0.05] ** 2).sum()) ** 0.5 / (0.05 * sizes.sum())
    share = estimates.enough(0.05, spread, 0.1)
    assert 0.05 < share < 0.8 and estimates.enough(share, 0.1 / estimates.Z, 0.1) == pytest.approx(share)
    errors = [abs(sizes[rng.random(4000) < share].sum() / share / sizes.sum() - 1) for _ in range(400)]
    assert np.mean(np.array(errors) < 0.1) > 0.8


def test_training_a_tokenizer_is_expected_to_take_less_than_text_grows_if_it_did():
    measured = {"trained": 100_000, "took": 1.0}
    assert rates.training_grows(1.5, 200_000, measured) == pytest.approx(0.585, abs=0.001)
    assert rates.training_grows(2.5, 200_000, measured) == 1.0, "never more than the text"
    assert rates.training_grows(1.05, 200_000, measured) == rates.SLOWEST
    assert rates.training_grows(0.9, 200_000, measured) == 1.0, "times that say nothing"
    assert rates.training_grows(1.2, 120_000, measured) == 1.0, "hardly more text"
