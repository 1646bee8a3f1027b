"""Tests metrics on their way to MLflow: each step of each metric arrives once and in order, for any behavior of the store."""

import json
import random

import pytest
from heliostat.storage.locations import Location
from heliostat.storage.run_folder import UNLOGGED
from heliostat.tracking import outbox
from heliostat.tracking.metrics import Point
from heliostat.tracking.outbox import Outbox
from heliostat.training.worker import node_metrics


class Store:
    """Accepts points, or fails: before it has stored them, or after, so that only its answer is lost."""

    def __init__(self, seed: int, failing: float) -> None:
        self.random, self.failing = random.Random(seed), failing
        self.points: list[Point] = []

    def send(self, points: list[Point]) -> None:
        assert 0 < len(points) <= outbox.BATCH
        draw = self.random.random()
        if draw < self.failing / 2:
            raise ConnectionError("away")
        self.points += points
        if draw < self.failing:
            raise ConnectionError("the answer was lost")

    def known(self) -> dict[str, int]:
        if self.random.random() < self.failing:
            raise ConnectionError("away")
        last: dict[str, int] = {}
        for point in self.points:
            last[point.key] = max(last.get(point.key, -1), point.place)
        return last


def steps(first: int, last: int) -> list[Point]:
    return [Point(key, s / 7, 1e9 + s, s) for s in range(first, last) for key in ("train/loss", "train/lr")]


@pytest.mark.parametrize("seed", range(40))
def test_every_step_arrives_once_and_in_order_through_failures_restarts_and_new_commands(tmp_path, monkeypatch, seed):
    """Attempts go back and report steps again, commands end at any moment, and the store fails before or after it stores a
    batch."""
    monkeypatch.setattr(outbox, "BATCH", 7)
    run, store, rng = Location(str(tmp_path)), Store(seed, failing=0.5), random.Random(seed)
    box, at, highest = Outbox(run, store.send, store.known), 1, 1
    while highest < 200:
        at = max(1, highest - rng.randint(0, 10)) if rng.random() < 0.3 else at
        end = at + rng.randint(1, 9)
        box.add(steps(at, end))
        at, highest = end, max(highest, end)
        try:
            box.flush()
        except ConnectionError:
            box.keep()
            if rng.random() < 0.3:  # the command is killed; another one begins
                box = Outbox(run, store.send, store.known)
    store.failing = 0.0
    box.flush()
    for key in ("train/loss", "train/lr"):
        assert [p.step for p in store.points if p.key == key] == list(range(1, highest))
    assert not len(box) and not run.join(UNLOGGED).exists()


def test_what_waits_is_in_the_runs_folder_and_goes_first(tmp_path):
    run, store = Location(str(tmp_path)), Store(0, failing=1.0)
    box = Outbox(run, store.send, store.known)
    box.add(steps(1, 4))
    with pytest.raises(ConnectionError):
        box.flush()
    box.keep()
    assert [Point(*json.loads(line)) for line in run.join(UNLOGGED).read().splitlines()] == steps(1, 4)
    store.failing = 0.0
    later = Outbox(run, store.send, store.known)
    later.add(steps(4, 6))
    later.flush()
    assert store.points == steps(1, 6) and not run.join(UNLOGGED).exists()


def test_beyond_the_limit_the_oldest_are_given_up_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(outbox, "LIMIT", 10)
    store = Store(0, failing=0.0)
    box = Outbox(Location(str(tmp_path)), store.send, store.known)
    box.add(steps(1, 9))
    box.flush()
    assert store.points == steps(4, 9) and "dropped the oldest 6 metrics that waited for MLflow" in caplog.text


def test_system_metrics_fill_a_place_of_their_own(tmp_path, monkeypatch, caplog):
    """During an outage with 64 nodes of 8 GPUs, all losses are kept, are sent first, and are also kept in the folder."""
    monkeypatch.setattr(outbox, "LIMIT", 100)
    monkeypatch.setattr(outbox, "SYSTEM_LIMIT", 50)
    run, store = Location(str(tmp_path)), Store(0, failing=1.0)
    box = Outbox(run, store.send, store.known)
    for step in range(1, 41):
        box.add(steps(step, step + 1))
        box.add(Point(f"system/10.0.0.{n}/gpu_0_power_usage_watts", 700.0, 1e9 + step, step) for n in range(64))
    assert len(box) == 80 + 50
    with pytest.raises(ConnectionError):
        box.flush()
    box.keep()
    store.failing = 0.0
    later = Outbox(run, store.send, store.known)
    assert later.flush() == 130
    assert store.points[:80] == steps(1, 41) and all(p.key.startswith("system/") for p in store.points[80:])
    box.flush()
    assert f"dropped the oldest {40 * 64 - 50} system metrics that waited" in caplog.text


def test_all_nodes_together_sample_no_more_than_mlflow_is_to_hold():
    """A node of 8 GPUs has 38 values: alone every 10 s, and 64 nodes together below a million values per day."""
    points = 6 + 4 * 8
    assert node_metrics.interval(1, points) == 10.0
    for nodes in (2, 8, 64, 1000):
        assert 86400 / node_metrics.interval(nodes, points) * nodes * points < 1e6


def test_what_mlflow_will_never_take_holds_up_nothing(tmp_path, caplog):
    class Refusal(Exception):
        error_code = "INVALID_PARAMETER_VALUE"

    taken: list[Point] = []

    def send(points: list[Point]) -> None:
        if points[0].step < 3:
            raise Refusal("no such metric")
        taken.extend(points)

    box = Outbox(Location(str(tmp_path)), send, dict)
    box.add(steps(1, 3))
    box.flush()
    box.add(steps(3, 5))
    box.flush()
    assert taken == steps(3, 5) and "rejected 4 metrics" in caplog.text


def test_goodput_is_of_a_time_and_not_of_a_step(tmp_path):
    """The same step may have it twice: at its checkpoint, and at the end of the command."""
    store = Store(0, failing=0.0)
    box = Outbox(Location(str(tmp_path)), store.send, store.known)
    for at in (1e9, 1e9 + 3):
        box.add([Point("train/time/goodput", 0.5, at, 20), Point("eval/loss", 1, at, 20)])
    box.flush()
    assert [p.key for p in store.points] == ["train/time/goodput", "eval/loss", "train/time/goodput"]
