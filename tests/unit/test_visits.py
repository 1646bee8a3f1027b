"""The steps that trained on a sample are what looking up every sample of every step gives, whatever the order."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from heliostat.data import visits
from heliostat.data.coverage import Segment
from heliostat.data.dataset import open_dataset

from tests.unit.test_dataset import make_dataset, make_plan
from tests.unit.test_order import random_order


@pytest.mark.parametrize("seed", range(30))
def test_a_position_leads_back_to_its_step(seed):
    order = random_order(seed)
    for step in {0, 1, 2, 5, 17, 60, int(np.random.default_rng(seed).integers(1, 200))}:
        for lane, positions in enumerate(order.step(step)):
            for place, position in enumerate(positions.tolist()):
                assert order.step_of(position) == (step, lane, place)


TWICE = ((12, 18, 3), (12, 18, 2))


@pytest.mark.parametrize(
    ("first", "skips", "fraction"),
    [(0, (), 0.0), (7, (), 0.3), (12, ((12, 18, 3),), 0.0), (20, ((12, 18, 3), (20, 25, 2)), 0.2), (12, TWICE, 0.0)],
)
def test_every_sample_of_every_chunk_is_found_in_its_steps(tmp_path: Path, first, skips, fraction):
    plan = make_plan(make_dataset(tmp_path / "a", 1), make_dataset(tmp_path / "b", 2))
    plan = dataclasses.replace(plan, skips=skips, held_fraction=fraction)
    data, expected = open_dataset(plan), dict[tuple[int, int], list[visits.Visit]]()
    for step in range(first, 60):
        found = data.order.locate(data.order.step(step).ravel())
        for i in range(len(found)):
            lane, place = divmod(i, plan.shape.per_lane)
            visit = visits.Visit(step + 1, lane, place, int(found.epoch[i]), int(found.row[i]))
            expected.setdefault((int(found.source[i]), int(found.chunk[i])), []).append(visit)
    segment = Segment(first, 60, plan)
    assert len(expected) > 5 and max(v.epoch for told in expected.values() for v in told) > 0, "chunks are met more than once"
    for source, made in enumerate(data.sources):
        for chunk, samples in enumerate(made.samples(plan.sequence_length).tolist()):
            told = expected.get((source, chunk), [])
            assert visits.visits(segment, source, chunk, range(samples)) == told
            some = range(samples // 3, samples // 2 + 1)
            assert visits.visits(segment, source, chunk, some) == [v for v in told if v.row in some]
