"""Tests learning-rate schedules: shape, ends, and bounds, for many lengths."""

import itertools
import random

import pytest
from heliostat.config.schedules import REGISTRY, Schedule, factor
from pydantic import ValidationError

from tests.seeds import every_seed

NAMES = tuple(REGISTRY)


def random_case(seed: int, name: str) -> tuple[Schedule, int]:
    rng = random.Random(seed)
    steps = rng.randrange(4, 3000)
    warmup = rng.choice([0, 1, rng.randrange(steps - 2)])
    return Schedule(name=name, warmup_steps=warmup, final_ratio=rng.random(), decay_fraction=rng.uniform(0, 1)), steps


def curve(schedule: Schedule, steps: int) -> list[float]:
    return [factor(schedule, t, steps) for t in range(steps)]


@pytest.mark.parametrize("name", NAMES)
@every_seed(30)
def test_the_rate_rises_to_its_peak_and_then_never_rises(name, seed):
    """Warm-up is linear from 1/warmup to exactly 1. After it, the factor falls or stays, between final_ratio and 1."""
    schedule, steps = random_case(seed, name)
    made, warmup = curve(schedule, steps), schedule.warmup_steps
    assert made[:warmup] == [(t + 1) / warmup for t in range(warmup)]
    assert max(made) == made[max(0, warmup - 1)] == pytest.approx(1.0, abs=1e-12)
    rest = made[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rest))
    assert min(rest) >= schedule.final_ratio - 1e-12


@pytest.mark.parametrize("name", ["cosine", "linear"])
@every_seed(30)
def test_the_last_step_has_the_final_ratio(name, seed):
    """Half of the decrease is done halfway, and the last step is exactly at final_ratio."""
    schedule, steps = random_case(seed, name)
    made = curve(schedule, steps)
    assert made[-1] == pytest.approx(schedule.final_ratio, abs=1e-9)
    middle = schedule.warmup_steps + (steps - 1 - schedule.warmup_steps) / 2
    if middle == int(middle):
        assert made[int(middle)] == pytest.approx((1 + schedule.final_ratio) / 2, abs=1e-9)


def test_cosine_is_flat_at_both_ends_and_linear_is_straight():
    """The first and last differences, compared with the middle one, distinguish the two."""
    cosine, linear = (curve(Schedule(name=n, final_ratio=0.0), 1001) for n in ("cosine", "linear"))
    falls = [cosine[t] - cosine[t + 1] for t in (0, 500, 999)]
    assert falls[0] < falls[1] / 100 and falls[2] < falls[1] / 100
    assert len({round(linear[t] - linear[t + 1], 12) for t in range(1000)}) == 1


@every_seed(30)
def test_wsd_stays_until_its_decay_and_ends_at_the_final_ratio(seed):
    """The factor is 1 before the last decay_fraction of the steps, and final_ratio at the last one, if that is two steps or
    more."""
    schedule, steps = random_case(seed, "wsd")
    made = curve(schedule, steps)
    start = max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))
    assert made[schedule.warmup_steps : start] == [1.0] * (start - schedule.warmup_steps)
    if steps - start >= 2:
        assert made[-1] == pytest.approx(schedule.final_ratio, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_one_step_have_a_rate(name):
    """There is no division by zero, and the rate is above 0."""
    assert 0 < factor(Schedule(name=name), 0, 1) <= 1
    assert factor(Schedule(name=name, warmup_steps=1), 1, 2) > 0


def test_an_unknown_name_is_no_schedule():
    """No function replaces it with another schedule."""
    with pytest.raises(ValidationError, match="Input should be 'cosine', 'constant', 'linear' or 'wsd'"):
        Schedule(name="cosin")
    with pytest.raises(KeyError, match="cosin"):
        factor(Schedule.model_construct(name="cosin", warmup_steps=0), 1, 2)
