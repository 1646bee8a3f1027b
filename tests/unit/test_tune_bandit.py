"""Tests that PB2 learns from the gains of the population's intervals, each with its hyperparameters; and HyperBand's shares."""

import math

import numpy as np
import pytest
from heliostat.tune import pb2, rungs
from heliostat.tune.pb2 import Interval
from heliostat.tune.space import Domain
from heliostat.tune.trial_record import TrialRecord

LR, DECAY = "train.optimizer.lr", "train.optimizer.weight_decay"
SPACE = {LR: Domain(loguniform=[1e-5, 1e-1]), DECAY: Domain(uniform=[0.0, 0.2])}


def test_an_interval_has_the_values_that_it_was_trained_with_and_a_clone_begins_with_its_donors_score():
    donor = TrialRecord(0, {LR: 1e-2}, reports=[(10, 5.0, 1.0), (20, 4.0, 3.0), (30, 3.5, 5.0)])
    clone = TrialRecord(1, {LR: 2e-2}, reports=[(10, 9.0, 1.0), (20, 8.0, 3.0), (30, 3.0, 5.0), (40, 2.5, 7.0)])
    clone.clones = [{"from": 0, "step": 20, "at": 4.0, "old": {LR: 1e-5}, "params": {LR: 2e-2}}]
    assert pb2.intervals([donor, clone]) == [
        Interval(0, 20, 5.0, pytest.approx(-0.1), {LR: 1e-2}),
        Interval(1, 20, 9.0, pytest.approx(-0.1), {LR: 1e-5}),
        Interval(0, 30, 4.0, pytest.approx(-0.05), {LR: 1e-2}),
        Interval(1, 30, 4.0, pytest.approx(-0.1), {LR: 2e-2}),
        Interval(1, 40, 3.0, pytest.approx(-0.05), {LR: 2e-2}),
    ]


def population(mode: str, size: int = 24) -> list[TrialRecord]:
    """Returns trials whose score grows faster the nearer their rate is to 1e-3, for any weight decay."""
    rng, found = np.random.default_rng(0), []
    for number in range(size):
        params = {LR: 10 ** rng.uniform(-5, -1), DECAY: rng.uniform(0, 0.2)}
        gain = 2 - abs(math.log10(params[LR]) + 3)
        sign = 1 if mode == "max" else -1
        found.append(TrialRecord(number, params, reports=[(10, 5.0, 1.0), (20, 5.0 + sign * gain, 2.0)]))
    return found


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_suggested_lies_where_the_population_gained_most(mode):
    """The suggested rate is nearer to the best one than a random one, which is a decade off on average. The same seed gives the
    same values."""
    records = population(mode)
    suggested = [pb2.suggest(records, 3, 20, SPACE, mode, np.random.default_rng(seed)) for seed in range(5)]
    assert all(s and 1e-5 <= s[LR] <= 1e-1 and 0 <= s[DECAY] <= 0.2 for s in suggested)
    assert np.median([abs(math.log10(s[LR]) + 3) for s in suggested if s]) < 0.75
    assert suggested[0] == pb2.suggest(records, 3, 20, SPACE, mode, np.random.default_rng(0))


@pytest.mark.ci
def test_trials_that_clone_at_the_same_step_are_given_different_values():
    records = population("min", 6)
    first = pb2.suggest(records, 3, 20, SPACE, "min", np.random.default_rng(0))
    assert first
    records[0].clones = [{"from": 3, "step": 20, "at": 3.0, "old": records[0].params, "params": first}]
    records[0].params = first
    second = pb2.suggest(records, 3, 20, SPACE, "min", np.random.default_rng(1))
    assert second and abs(math.log10(second[LR] / first[LR])) + abs(second[DECAY] - first[DECAY]) / 0.2 > 0.05


def test_with_one_report_there_is_nothing_to_learn_from():
    records = [TrialRecord(n, {LR: 1e-3, DECAY: 0.1}, reports=[(10, 5.0, 1.0)]) for n in range(4)]
    assert pb2.suggest(records, 0, 10, SPACE, "min", np.random.default_rng(0)) is None


@pytest.mark.parametrize("reduction", [2, 3, 4])
@pytest.mark.parametrize("brackets", [1, 2, 4, 6])
def test_every_budget_is_shared_as_hyperband_shares_its_own(brackets, reduction):
    """After any number of trials, each bracket's count equals its share within one trial."""
    shares, counts = rungs.shares(brackets, reduction), [0] * brackets
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    for number in range(120):
        counts[rungs.bracket_of(number, brackets, reduction)] += 1
        assert all(abs(count - share * (number + 1)) <= 1 for count, share in zip(counts, shares, strict=True))
