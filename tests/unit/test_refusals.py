"""Tests that a store's rejection of one node's request doesn't end a run, unless the driver is rejected, too."""

import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.errors import AccessError, HeliostatError, StoppedError, unwrapped
from heliostat.storage import wire
from heliostat.training.driver import suspects
from heliostat.training.driver.recovery import Budget
from heliostat.training.driver.run import DrivenRun
from heliostat.training.driver.states import Begin, Course

from tests.unit.build_job import job

NODE = "a" * 56


def refusal(place: Path) -> AccessError:
    return AccessError(f"{place}: access refused (RequestTimeTooSkewed)", str(place), NODE)


def run_of(storage: Path) -> Any:
    """Simulates a run in its first attempt: the members that a failure uses."""
    made = job(**{"storage": str(storage), "data.sources.0.path": str(storage / "data")})
    made.run_folder.join("x").write(b"")
    restarts = list[tuple[str, str]]()
    run: Any = object.__new__(DrivenRun)
    run.job, run.course, run.plan, run.restarts = made, Course(Budget(made.retries), 0, 0, 0), SimpleNamespace(skips=()), restarts
    run.ledger = SimpleNamespace(restart=lambda outcome, reason: restarts.append((outcome, reason)))
    run.spending, run._pause, run._exclude = SimpleNamespace(reached=""), lambda *_: None, lambda *_: []
    run.memory = SimpleNamespace(forget=lambda: pytest.fail("the copies are good"))
    return run


def recover(run: Any, error: HeliostatError) -> None:
    """Lets the next attempt of the run fail."""
    run._follow(Begin())
    run._failed(run.course.attempt, error)


def test_a_refusal_that_the_driver_does_not_meet_is_a_nodes_failure_and_tried_again(tmp_path):
    run = run_of(tmp_path)
    error = refusal(tmp_path / "small" / "checkpoints" / "x")
    recover(run, error)
    assert run.restarts == [("failed", str(error))] and run.course.budget.used == 1
    with pytest.raises(AccessError, match="Giving up after 10 retries"):  # within the budget of all failures
        for _ in range(10):
            recover(run, error)


def test_a_refusal_that_the_driver_meets_too_is_final(tmp_path):
    """If the run's folder isn't writable, the run ends at once, with the worker's own message."""
    run = run_of(tmp_path)
    error = refusal(tmp_path / "small" / "checkpoints" / "x")
    (tmp_path / "small" / "x").unlink()
    (tmp_path / "small").rmdir()
    (tmp_path / "small").write_text("a file where the folder was")
    with pytest.raises(AccessError) as raised:
        recover(run, error)
    assert raised.value is error and not run.restarts


def test_the_place_of_the_error_is_probed_whichever_it_is(tmp_path, monkeypatch):
    """For example, the initial weights of a model, which no other key names."""
    run, asked = run_of(tmp_path), []
    monkeypatch.setattr("heliostat.storage.locations.Location.exists", lambda self: asked.append(self.uri))
    assert not suspects.refuses_driver(refusal(tmp_path / "weights"), run.job)
    assert asked == [str(tmp_path / "data"), str(tmp_path / "weights")]


def test_the_refused_node_is_avoided_where_others_have_room(monkeypatch):
    avoided = list[str]()
    pool = SimpleNamespace(avoided=set, held=lambda: Counter({NODE: 2, "b": 1}), avoid=avoided.extend)
    monkeypatch.setattr("heliostat.cluster.nodes.room_now", lambda _job, held, out: held.get("b", 0) + 1 if NODE in out else 9)
    suspects.avoid_refused(NODE, job(), 3, pool)
    assert avoided == []
    suspects.avoid_refused(NODE, job(), 2, pool)
    assert avoided == [NODE]
    suspects.avoid_refused("", job(), 1, pool)  # it is not known which
    assert avoided == [NODE]


def test_a_refusal_keeps_the_node_of_the_process_that_met_it_first(monkeypatch):
    """All workers raise it, but only the first one's node counts, not those that pass it on."""
    monkeypatch.setattr(AccessError, "this_node", "there")
    first = AccessError("no", "s3://b/k")
    sent = wire.pack(first), pickle.dumps(first)
    monkeypatch.setattr(AccessError, "this_node", "here")
    for again in (wire.unpack(sent[0]), pickle.loads(sent[1])):  # noqa: S301
        assert (again.node, again.place, str(again)) == ("there", "s3://b/k", "no")
    wrapped = RuntimeError("UDF")
    wrapped.cause = first  # type: ignore[attr-defined]  # as Ray's wrappers have
    with pytest.raises(AccessError) as third, unwrapped():
        raise wrapped
    assert (third.value.node, third.value.place) == ("there", "s3://b/k")


def test_stopping_is_not_taken_for_a_failure(tmp_path):
    with pytest.raises(StoppedError):
        recover(run_of(tmp_path), StoppedError("stopped"))
