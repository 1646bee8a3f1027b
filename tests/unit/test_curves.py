"""Tests that a checkpoint never gets ahead of the curves: the run's folder fills the gaps in MLflow, in order and once."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.errors import DataError
from heliostat.runs import segments
from heliostat.runs.events import AttemptStarted, Evaluation, LossSpike, Saved, Steps
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.tracking import local_curves
from heliostat.tracking.logger import RunOwner
from heliostat.tracking.metrics import Point
from heliostat.tracking.outbox import Outbox

from tests.unit.test_outbox import Store, steps


def event(first: int, end: int, **facts: Any) -> Steps:
    values = [s / 7 for s in range(first, end)]
    told = Steps(first=first - 1, loss=values, lr=values, grad_norm=values, seconds=1.0, at=1e9, ledger={"computing": 1.0})
    return replace(told, **facts)


def score(step: int) -> Evaluation:
    return Evaluation(step=step, scores={"loss": 1.0}, at=1e9, images={"x": b"PNG"})


@pytest.fixture
def run(tmp_path) -> Location:
    place = Location(str(tmp_path))
    local_curves.write(place, 10, [event(1, 6), event(6, 11), score(10)])
    local_curves.write(place, 20, [event(11, 21), score(20)])
    return place


def test_only_files_that_end_behind_the_last_known_step_are_read(run):
    run.join(run_folder.CURVES, "step-00000010.json").write(b"damaged")
    found = local_curves.missing(run, {"train/loss": 10})
    assert [p.step for p in found if p.key == "train/loss"] == list(range(11, 21))
    assert [p.step for p in found if p.key == "eval/loss"] == [20]
    assert local_curves.missing(run, {"train/loss": 20}) == []


def test_a_score_that_an_earlier_version_could_not_measure_has_no_point(run):
    told = [{"kind": "evaluation", "at": 1e9, "step": 30, "scores": {"loss": None, "accuracy": 0.5}}]
    run.join(run_folder.CURVES, "step-00000030.json").write(json.dumps(told).encode())
    assert local_curves.missing(run, {"train/loss": 20}) == [Point("eval/accuracy", 0.5, 1e9, 30)]


def test_checkpoints_are_looked_up_after_the_start_that_went_back_before_them():
    """While MLflow is unreachable, the start forgets the known checkpoints, so that checkpoints saved again are read."""
    owner, order = RunOwner.__new__(RunOwner), list[str]()
    owner._facts = {}
    owner._record = SimpleNamespace(attempt=lambda event: order.append("start"), sync=lambda step: order.append(str(step)))
    saved, start = Saved(step=10, blocked_s=0.0), AttemptStarted(start_step=5, workers=1, nodes=[])
    for told in (saved, start, saved):
        owner._take(told, Outbox(Location("unused"), lambda points: None, dict))
    for write in owner._facts.values():
        write()
    assert order == ["start", "10"]


@pytest.mark.parametrize("had", [0, 3, 10, 14, 20, 22])
def test_a_killed_drivers_curves_are_whole_whatever_it_had_logged_and_kept(run, had):
    """MLflow has `had` steps. The unlogged steps of the folder follow, and the resumed attempt continues from step 20."""
    store = Store(0, 0.0)
    store.points = steps(1, had + 1)
    killed = Outbox(run, store.send, store.known)
    killed.add(steps(had + 1, had + 3))  # what came after these was lost
    killed.keep()
    box = Outbox(run, store.send, store.known)
    box.add(steps(21, 31))  # already waits when the run is opened
    box.precede(local_curves.missing(run, store.known()))
    box.flush()
    logged = [p.step for p in store.points if p.key == "train/loss"]
    assert logged == list(range(1, 31))
    assert sum(p == Point("eval/loss", 1.0, 1e9, 20) for p in store.points) == (had < 20)


def test_spikes_and_added_losses_are_curves_too(run):
    """The other values of a step are restored from the run's folder, or rejected in one line."""
    spike = LossSpike(step=22, loss=9.0, usual=1.0, limit=4.0, action="warn", at=1e9)
    local_curves.write(run, 30, [event(21, 31, added={"router_loss": [0.5] * 10}), spike])
    found = local_curves.missing(run, {"train/loss": 20})
    assert [(p.value, p.step) for p in found if p.key == "train/spike"] == [(9.0, 22)]
    assert [p.step for p in found if p.key == "train/router_loss"] == list(range(21, 31))
    local_curves.write(run, 30, [event(21, 31, added={"router_loss": [0.5] * 9})])
    with pytest.raises(DataError, match="different numbers of steps"):
        local_curves.missing(run, {"train/loss": 20})


def test_curves_of_earlier_versions_are_read(run, caplog):
    """They lack newer fields and have fields that no longer exist. An unknown kind of event isn't a curve, and is reported."""
    old = {"kind": "steps", "first": 20, "loss": [1.0], "lr": [0.1], "grad_norm": [2.0], "steps": 30, "seconds": 1.0, "at": 1e9,
           "sources": {"a": {"samples": 8.0}}}  # fmt: skip
    saved = {"kind": "checkpoint", "step": 21, "blocked_s": 0.5, "at": 1e9}
    text = json.dumps([old, saved, {"kind": "held", "step": 21, "at": 1e9}])
    run.join(run_folder.CURVES, "step-00000021.json").write(text.encode())
    assert {(p.key, p.value, p.step) for p in local_curves.missing(run, {"train/loss": 20})} == {
        ("train/loss", 1.0, 21), ("train/lr", 0.1, 21), ("train/grad_norm", 2.0, 21), ("train/data/a/samples", 8.0, 21),
        ("train/checkpoint/blocked_s", 0.5, 21),
    }  # fmt: skip
    assert "an event of kind 'held' comes from another version" in caplog.text


def test_going_back_removes_the_curves_of_later_steps(run):
    class Plan:
        begins = 1

    segments.begin(run, Plan(), 10)  # type: ignore[arg-type]
    assert [name for name, _ in run.join(run_folder.CURVES).files()] == ["step-00000010.json"]
