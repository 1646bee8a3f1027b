"""Stride scheduling by arithmetic: exact shares, the same sources however they are asked for, and no tables."""

import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from heliostat.data.mixing import OWED, Mixture, proportions
from heliostat.errors import ConfigError

from tests.unit.test_order import WEIGHTS


def random_mixture(seed: int) -> Mixture:
    """Any weights, units of several samples, and sources that are owed something or had too much."""
    rng = np.random.default_rng(seed)
    weights = [round(float(w), int(rng.integers(0, 5))) for w in rng.random(int(rng.integers(1, 8)))]
    weights[0] = weights[0] or 1.0
    owed = [int(d) for d in rng.integers(-4 * OWED, 4 * OWED, len(weights))] if rng.random() < 0.5 else None
    return Mixture(weights, int(rng.choice([1, 1, 3])), owed)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sources_are_mixed_exactly_over_a_period_and_within_one_percent_of_any_ten_thousand(weights):
    """Each source's share of any 10,000 consecutive samples is its weight to within 1 % of the samples."""
    mixture, share = Mixture(weights), np.array(weights) / sum(weights)
    assert np.allclose(mixture.counts(mixture.period) / mixture.period, share, rtol=1e-12, atol=0)
    for start in np.random.default_rng(0).integers(0, 10**9, 300).tolist():
        got = mixture.counts(start + 10_000) - mixture.counts(start)
        assert got.sum() == 10_000 and np.abs(got - 10_000 * share).max() <= 100
    source, _ = mixture.lay_out(0, 50_000)
    prefixes = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(prefixes - np.arange(1, 50_001)[:, None] * share).max() <= len(weights)


@pytest.mark.parametrize("seed", range(60))
def test_any_stretch_is_that_of_the_whole_and_counting_agrees_with_listing(seed):
    """Nothing depends on where a stretch begins or ends; a source's samples are numbered one after another."""
    rng, mixture = np.random.default_rng([seed, 1]), random_mixture(seed)
    begin = int(rng.choice([0, 0, 10**9, 10**13]))
    source, item = mixture.lay_out(begin, begin + 3000)
    before = mixture.counts(begin)
    for s in range(len(before)):
        assert np.array_equal(item[source == s], before[s] + np.arange((source == s).sum()))
    for a, b in np.sort(rng.integers(0, 3000, (8, 2)), axis=1).tolist():
        part = mixture.lay_out(begin + a, begin + b + 1)
        assert np.array_equal(part[0], source[a : b + 1]) and np.array_equal(part[1], item[a : b + 1])
        assert np.array_equal(mixture.counts(begin + a), before + np.bincount(source[:a], minlength=len(before)))
    assert mixture.counts(begin).sum() == begin


@pytest.mark.parametrize("seed", range(60))
def test_what_is_owed_is_the_share_less_what_was_taken(seed):
    """The account balances to a billionth of a sample, and stays within a few samples."""
    mixture, rng = random_mixture(seed), np.random.default_rng(seed)
    start = np.array(mixture.owed(0)) / OWED
    for units in [0, *rng.integers(0, 10**7, 5).tolist()]:
        position = units * mixture.unit
        owed, taken = np.array(mixture.owed(position)) / OWED, mixture.counts(position) // mixture.unit
        assert np.allclose(owed, start + mixture.shares * units - taken, atol=1e-6)
        if units > 10**5:
            assert np.abs(owed[mixture.shares > 0.01]).max(initial=0) < len(taken) / 2 + 1 + np.abs(start).sum()


def test_the_order_is_by_exact_due_times():
    """A long period against its definition, in whole numbers of any size: the sample with the earliest (2j + 1) / c first."""
    weights = [0.61803, 0.27183, 0.11014]
    mixture = Mixture(weights)
    due = sorted((Fraction(2 * j + 1, c), s) for s, c in enumerate(mixture.parts) for j in range(c))
    assert mixture.lay_out(0, mixture.period)[0].tolist() == [s for _, s in due]


def test_a_hundred_sources_of_six_digits_take_no_memory_and_no_time():
    """Tables of the period would be 800 MB."""
    rng = np.random.default_rng(0)
    weights = [round(float(w), 6) for w in rng.dirichlet(np.ones(100))]
    tracemalloc.start()
    started = time.process_time()
    mixture = Mixture(weights)
    source, _ = mixture.lay_out(10**12, 10**12 + 8192)
    counts = mixture.counts(10**12)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mixture.period > 900_000 and peak < 8 << 20 and seconds < 2
    assert counts.sum() == 10**12 and len(set(source.tolist())) > 90


def test_weights_that_mean_the_same_give_the_same_mixture():
    """Only proportions count, and decimal weights are taken as written (0.1 is a tenth)."""
    assert proportions([0.1, 0.2]) == proportions([1.0, 2.0]) == [1, 2]
    assert proportions([5.0, 5.0]) == proportions([0.5, 0.5])
    assert proportions([0.7, 0.2, 0.1]) == [7, 2, 1]


@pytest.mark.parametrize("weights", [[1.0, 0.33333333333333331], [1e-300, 1.0], [1.0, 1e9]])
def test_weights_that_cannot_be_honoured_are_refused(weights):
    """One ConfigError, not a frozen machine."""
    with pytest.raises(ConfigError, match=r"data\.sources: weights .* round them"):
        Mixture(weights)
