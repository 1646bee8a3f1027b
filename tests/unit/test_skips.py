"""Tests samples left out of the order, for example after a loss spike: all others keep their places, and no stream delivers a
skipped sample."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from heliostat.data import stream
from heliostat.data.dataset import DataPlan
from heliostat.data.mixing import Shape
from heliostat.data.order import Order
from heliostat.data.split import growing_runs

from tests.seeds import every_seed

STEPS = 60


def order(seed: int, skips: list[tuple[int, int]]) -> Order:
    rng = np.random.default_rng(seed)
    lanes, per_lane, steps_per_block = (int(n) for n in rng.integers(1, 5, 3))
    shape = Shape(lanes * per_lane, lanes, steps_per_block, per_lane * steps_per_block * int(rng.integers(1, 6)))
    split = growing_runs(rng.integers(1, 40, 12), np.arange(12).astype(np.uint64), 0.1)
    return Order([split], [(0, [1.0])], seed, shape, skips=skips)


def random_skips(seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng([seed, 1])
    steps = sorted(rng.choice(STEPS, int(rng.integers(1, 4)), replace=False).tolist())
    return [(step, int(rng.integers(1, 30))) for step in steps]


@every_seed(40)
def test_a_step_takes_what_lies_behind_all_that_was_left_out_before_it(seed):
    """Step t equals the full sequence's step t plus the steps left out up to t, so earlier steps never change."""
    skips = random_skips(seed)
    whole, short = order(seed, []), order(seed, skips)
    for step in range(STEPS):
        later = sum(count for at, count in skips if at <= step)
        assert np.array_equal(short.step(step), whole.step(step + later))
        assert np.array_equal(short.consumed(step), whole.consumed(step + later))


@every_seed(40)
@pytest.mark.parametrize("start", [0, 7, 31])
def test_the_stream_brings_each_round_that_is_trained_on_once_and_no_other(seed, start):
    made = order(seed, random_skips(seed))
    fetch = stream.fetch(SimpleNamespace(shape=made.shape), made, start, STEPS, replace=True)
    brought = [n for i in range(fetch.count) for n in made.blocks(fetch.window(i)) if any(a <= n < b for a, b in fetch.wanted)]
    rounds = list(dict.fromkeys(made.round_of(step).block for step in range(start, STEPS)))
    assert brought == [first + lane for first in rounds for lane in range(made.shape.lanes)]


def test_a_plan_with_skips_is_another_sequence_and_one_without_keeps_its_digest():
    """Runs from before skips existed continue with the digest in their receipts."""
    plan = DataPlan(("a",), ("d",), ((0, (1.0,)),), (None,), 64, 1, 0.0, Shape(8, 4, 2, 16))
    raw = plan.dump()
    del raw["skips"]
    assert DataPlan.parse(raw) == plan and DataPlan.parse(raw).digest == plan.digest
    skipping = dataclasses.replace(plan, skips=((30, 32, 2),))
    assert DataPlan.parse(skipping.dump()) == skipping and skipping.digest != plan.digest
    assert (plan.begins, skipping.begins, skipping.first_step) == (0, 30, 0)
