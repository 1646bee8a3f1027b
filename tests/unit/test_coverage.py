"""Tests the share of each row group that a run has trained on, and the steps: they equal a lookup of every single sample, in any
order."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from heliostat.data import coverage
from heliostat.data.coverage import Segment, counts, cut
from heliostat.data.dataset import open_dataset
from heliostat.data.order import Order
from heliostat.runs import consumed

from tests.seeds import every_seed
from tests.unit.test_dataset import make_dataset, make_plan
from tests.unit.test_order import random_order


@every_seed(30)
def test_counts_equal_looking_up_every_sample(seed):
    order = random_order(seed)
    steps = {0, 1, 2, 5, 17, 60, int(np.random.default_rng(seed).integers(1, 200))}
    found = order.locate(np.concatenate([order.step(s).ravel() for s in range(max(steps))]))
    for step in steps:
        expected = [np.zeros(len(split.samples), np.int64) for split in order.splits]
        for source, chunk in zip(found.source[: step * order.shape.batch], found.chunk, strict=False):
            expected[source][chunk] += 1
        got = counts(order, step)
        assert all((a == b).all() for a, b in zip(got, expected, strict=True)), step


def test_segments_are_cut_at_each_other_and_at_the_last_step(tmp_path: Path):
    plan = make_plan(make_dataset(tmp_path / "a", 1))
    later = dataclasses.replace(plan, mix=((20, (1.0,)),))
    back = dataclasses.replace(plan, skips=((12, 12, 3),))
    assert [(s.first, s.end) for s in cut([plan, later], 30)] == [(0, 20), (20, 30)]
    assert [(s.first, s.end) for s in cut([plan, later], 15)] == [(0, 15)]
    assert [(s.first, s.end, s.plan) for s in cut([plan, back], 30)] == [(0, 12, plan), (12, 30, back)]
    assert cut([plan], 0) == cut([], 5) == []


TWICE = ((12, 18, 3), (12, 18, 2))


@pytest.mark.parametrize(
    ("first", "skips"),
    [
        (12, ((12, 12, 3),)),
        (12, ((12, 18, 3),)),
        (20, ((12, 18, 3), (20, 25, 2))),
        (5, ((5, 30, 4),)),
        (12, TWICE),
        (12, ((12, 39, 3),)),
    ],
)
def test_what_a_rollback_left_out_is_not_counted(tmp_path: Path, first, skips):
    """The run returns to a checkpoint, repeats the steps up to the spike, and continues after it. Only the samples of trained
    steps count."""
    plan = dataclasses.replace(make_plan(make_dataset(tmp_path / "a", 1), make_dataset(tmp_path / "b", 2)), skips=skips)
    data = open_dataset(plan)
    for end in (first + 1, 26, 40):
        found = data.order.locate(np.concatenate([data.order.step(s).ravel() for s in range(first, end)]))
        got = coverage.segment_counts(Segment(first, end, plan), data.sources)
        for source in (0, 1):
            expected = Counter(found.chunk[found.source == source].tolist())
            assert {i: int(n) for i, n in enumerate(got[source]) if n} == expected
    told = consumed._segment(Segment(first, 40, plan))["sources"]
    assert sum(s["samples"] for s in told) == (40 - first) * plan.shape.batch
    inside = sum(count for _, at, count in skips if first < at <= 40)
    assert sum(s["left_out"] for s in told) == inside * plan.shape.batch


def test_a_run_that_left_nothing_out_says_so_at_every_step(tmp_path: Path):
    """This also holds within a round, where the virtual ranks are at other places of the sequence."""
    plan = make_plan(make_dataset(tmp_path / "a", 1), make_dataset(tmp_path / "b", 2))
    for end in range(1, 24):
        told = consumed._segment(Segment(0, end, plan))["sources"]
        assert [s["left_out"] for s in told] == [0, 0] and sum(s["samples"] for s in told) == end * plan.shape.batch


def record_of(plan, steps: int, replaced: list[dict] | None = None) -> dict:
    segments = [consumed._segment(s) for s in cut([plan], steps)]
    return {"steps": steps, "segments": segments, "replaced": replaced or [], "replaced_count": len(replaced or [])}


def test_a_record_answers_by_shard_and_by_digest_up_to_a_step(tmp_path: Path):
    a, b = make_dataset(tmp_path / "a", 1), make_dataset(tmp_path / "b", 2)
    plan = make_plan(a, b)
    raw = record_of(plan, 10)
    assert sum(s["samples"] for s in raw["segments"][0]["sources"]) == 10 * plan.shape.batch
    assert consumed.of_digest(raw, a.digest[:8]) + consumed.of_digest(raw, b.digest) == 10 * plan.shape.batch
    assert consumed.of_digest(raw, "f" * 64) == consumed.of_digest(raw, a.digest, before=0) == 0
    order = open_dataset(plan).order
    shards = {}
    for step in range(4):
        found = order.locate(order.step(step).ravel())
        for chunk in found.chunk[found.source == 0]:
            path = a.chunks["path"][int(chunk)].as_py()
            shards[path] = shards.get(path, 0) + 1
    for path in set(a.chunks["path"].to_pylist()):
        assert consumed.of_shard(raw, f"{a.location}/{path}", before=4) == shards.get(path, 0)
    name = "0.parquet"  # of both datasets
    both = consumed.of_shard(raw, f"{a.location}/shards/{name}") + consumed.of_shard(raw, f"{b.location}/shards/{name}")
    assert consumed.of_shard(raw, name) == both and consumed.of_shard(raw, "10.parquet") == 0


def test_a_shard_is_found_by_its_path_by_the_end_of_it_and_by_the_folder_of_its_contents():
    """`prepare` names a shard's file after its content, in a folder with its number."""
    uri, path = "/data/text", "shards/00017/f7122eddf445c2ad.parquet"
    for wanted in (f"{uri}/{path}", path, "f7122eddf445c2ad.parquet", f"{uri}/shards/00017", "shards/00017", "00017"):
        assert consumed.same(wanted, uri, path), wanted
    for wanted in ("00018", "shards/0017", "7", "ards/00017", "/data/other/shards/00017"):
        assert not consumed.same(wanted, uri, path), wanted


def test_a_replaced_sample_is_its_replacements(tmp_path: Path):
    a = make_dataset(tmp_path / "a", 1)
    plan = make_plan(a)

    def place(shard: str) -> dict:
        return {"dataset": plan.uris[0], "shard": shard, "row_group": 0, "row": 0}

    bad = {"step": 3, **place("shards/0.parquet"), "reason": "damaged", "replaced_by": place("shards/1.parquet")}
    plain, raw = record_of(plan, 10), record_of(plan, 10, [bad])
    for shard, change in (("0", -1), ("1", 1), ("2", 0)):
        name = f"shards/{shard}.parquet"
        assert consumed.of_shard(raw, name) - consumed.of_shard(plain, name) == change
        for before, now in ((2, 0), (3, change)):  # a checkpoint after step 3 has trained on the replacement
            assert consumed.of_shard(raw, name, before) - consumed.of_shard(plain, name, before) == now


def test_ranges_join_what_is_consecutive_in_the_manifest(tmp_path: Path):
    a = make_dataset(tmp_path / "a", 1, shards=6)
    names = [f"shards/{i}.parquet" for i in range(6)]
    seen = {names[i]: 1 for i in (0, 1, 3, 5)}
    assert list(coverage.ranges(a, seen)) == [(names[0], names[1]), (names[3], names[3]), (names[5], names[5])]
    assert list(coverage.ranges(a, {})) == []


@every_seed(30)
def test_a_position_leads_back_to_its_step(seed):
    order = random_order(seed)
    for step in {0, 1, 2, 5, 17, 60, int(np.random.default_rng(seed).integers(1, 200))}:
        for lane, positions in enumerate(order.step(step)):
            for place, position in enumerate(positions.tolist()):
                assert order.step_of(position) == (step, lane, place)


@pytest.mark.parametrize(
    ("first", "skips", "fraction", "window"),
    [(0, (), 0.0, 32), (7, (), 0.3, 32), (12, ((12, 18, 3),), 0.0, 32), (20, ((12, 18, 3), (20, 25, 2)), 0.2, 32),
     (12, TWICE, 0.0, 32), (7, (), 0.3, 4096)],
)  # fmt: skip
def test_every_sample_of_every_chunk_is_found_in_its_steps(tmp_path: Path, monkeypatch, first, skips, fraction, window):
    """Also if a window has many epochs. No window is located twice."""
    plan = make_plan(make_dataset(tmp_path / "a", 1), make_dataset(tmp_path / "b", 2))
    plan = dataclasses.replace(plan, skips=skips, held_fraction=fraction, shape=dataclasses.replace(plan.shape, window=window))
    located, locate = list[int](), Order.locate
    monkeypatch.setattr(Order, "locate", lambda self, positions: located.append(len(positions)) or locate(self, positions))
    data, expected = open_dataset(plan), dict[tuple[int, int], list[coverage.Visit]]()
    for step in range(first, 60):
        found = data.order.locate(data.order.step(step).ravel())
        for i in range(len(found)):
            lane, place = divmod(i, plan.shape.per_lane)
            visit = coverage.Visit(step + 1, lane, place, int(found.epoch[i]), int(found.row[i]))
            expected.setdefault((int(found.source[i]), int(found.chunk[i])), []).append(visit)
    segment = Segment(first, 60, plan)
    assert len(expected) > 5 and max(v.epoch for told in expected.values() for v in told) > 0, "chunks are met more than once"
    for source, made in enumerate(data.sources):
        for chunk, samples in enumerate(made.samples(plan.sequence_length).tolist()):
            told = expected.get((source, chunk), [])
            located.clear()
            assert coverage.visits(segment, source, chunk, range(samples)) == told
            assert sum(located) <= window * (60 * plan.shape.batch // window + 1)
            some = range(samples // 3, samples // 2 + 1)
            assert coverage.visits(segment, source, chunk, some) == [v for v in told if v.row in some]
