"""Tests `limits`: hours and cost of a whole run, over all its commands. The run stops after a checkpoint, and reports the
limit."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.errors import ConfigError, LimitError, PlacementError, StoppedError, StorageError
from heliostat.runs import goodput, time_ledger
from heliostat.runs.goodput import RecordedAttempt
from heliostat.runs.time_ledger import LedgerRecorder
from heliostat.storage.locations import Location
from heliostat.training.driver import limits
from heliostat.training.driver.limits import Spending, hourly
from heliostat.training.driver.recovery import Budget
from heliostat.training.driver.run import DrivenRun
from heliostat.training.driver.signals import Signals
from heliostat.training.driver.states import Course, Stopped
from heliostat.training.stops import INTERRUPTED
from heliostat.tune import sweep

from tests.unit.build_job import job
from tests.waiting import until

HOUR = 3600.0


def node(*accelerators: str, gpus: float = 8.0, **node_labels: str) -> dict[str, Any]:
    return {"gpus": gpus, "cpus": 192.0, "accelerators": list(accelerators), "labels": node_labels}


def ledger(folder: Path, *earlier: tuple[float, int, float], started: float = 0.0) -> LedgerRecorder:
    """Returns a run's ledger: earlier commands as (hours, workers, hours in the queue), and this one, which began `started`
    seconds ago."""
    run = Location(str(folder))
    for i, (hours, workers, queued) in enumerate(earlier):
        begun = 1e9 + i * 100 * HOUR  # with days between the commands
        parts = {"queued": queued * HOUR, "computing": (hours - queued) * HOUR}
        one = RecordedAttempt(
            f"a{i}", begun, begun + hours * HOUR, begun + hours * HOUR, 0, workers, parts=parts, outcome="failed"
        )
        run.join("ledger", one.name).write(one.dump())
    return LedgerRecorder(run, time.time() - started, 0, 2)


def spending(folder: Path, wanted: dict[str, Any], *earlier: tuple[float, int, float], **workers: Any) -> Spending:
    return Spending(job(**{"limits": wanted, "workers": workers}), ledger(folder, *earlier))


def test_hours_count_over_all_commands_and_not_between_them(tmp_path):
    watched = spending(tmp_path, {"hours": 5.0}, (2.0, 4, 0.0), (2.5, 4, 1.0))
    assert watched.due() and watched.check() == "" and not watched.due()
    more = spending(tmp_path, {"hours": 4.5}, (2.0, 4, 0.0), (2.5, 4, 1.0))
    assert more.check() == "limits.hours: the limit of 4.5 h is reached (4.50 h over all commands)" and not more.due()


def test_money_is_what_workers_hold_at_the_price_of_their_node(tmp_path):
    """2 h x 4 workers and 1.5 h x 4, without the hour in which they waited for their nodes: 14 worker-hours of an H100."""
    at = spending(tmp_path, {"cost": 96.0}, (2.0, 4, 0.0), (2.5, 4, 1.0), gpus=1)
    at.look([node("H100")])
    assert at.check() == "limits.cost: the limit of 96 USD is reached (96.32 over all commands)"
    below = spending(tmp_path, {"cost": 97.0}, (2.0, 4, 0.0), (2.5, 4, 1.0), gpus=1)
    below.look([node(gpus=0.0)])  # the GPU nodes have not come yet
    below.look([node("H100")])
    assert below.check() == ""


def test_a_price_that_is_not_known_is_an_error_and_only_of_nodes_that_may_hold_workers():
    workers = job(workers={"gpus": 2, "labels": {"pool": "a"}}).workers
    assert hourly(workers, [node("L4", pool="a"), node("MI300X", pool="b")]) == pytest.approx(2 * 1.67)
    assert hourly(workers, [node("H100", pool="a"), node("A100-80G", pool="a")]) == pytest.approx(2 * 6.88)
    assert hourly(workers, []) is None and hourly(job(workers={"cpus": 4}).workers, []) == pytest.approx(0.2)
    of_ray = job(workers={"gpus": 1, "labels": {"pool": "a", "ray.io/accelerator-type": "L4"}}).workers
    assert hourly(of_ray, [node("L4", pool="a"), node("H100", pool="a")]) == pytest.approx(1.67)
    with pytest.raises(ConfigError, match=r"^limits\.cost: the price table has no price for MI300X\. .*\. Use limits\.hours"):
        hourly(job(workers={"gpus": 1}).workers, [node("H100"), node("MI300X")])
    with pytest.raises(ConfigError, match="a GPU whose name Ray doesn't know"):
        hourly(job(workers={"gpus": 1}).workers, [node()])


def test_a_command_whose_run_has_used_up_its_limit_does_not_begin(tmp_path):
    with pytest.raises(ConfigError, match=r"limits\.hours: the limit of 4 h is reached .*\. Raise the limit to continue"):
        spending(tmp_path, {"hours": 4.0}, (5.0, 4, 0.0)).require_left()
    with pytest.raises(ConfigError, match=r"limits\.cost: the limit of 0\.5 USD is reached"):
        spending(tmp_path, {"cost": 0.5}, (5.0, 4, 0.0), cpus=1).require_left()
    spending(tmp_path, {}, (500.0, 4, 0.0)).require_left()


def test_a_limit_stops_a_run_as_a_signal_does_and_the_error_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr("heliostat.cluster.nodes.inventory", list)
    watched = spending(tmp_path, {"hours": 1.0}, (2.0, 1, 0.0))
    run: Any = SimpleNamespace(
        ledger=watched._ledger,
        lease=SimpleNamespace(lost=None),
        spending=watched,
        signals=Signals(),
        job=job(),
        course=under_way(0),
    )
    run._follow, run._carry_out = partial(DrivenRun._follow, run), partial(DrivenRun._carry_out, run)
    DrivenRun._beat(run)
    assert run.signals.name.startswith("limits.hours: the limit of 1 h is reached")
    with pytest.raises(
        LimitError, match=r"^limits\.hours: .*; stopped at step 7, after a checkpoint\. Raise the limit, and use --resume"
    ):
        run._follow(Stopped(1, INTERRUPTED, 7, watched.reached))
    run.course = under_way(0)
    with pytest.raises(LimitError, match="before the first step"):
        DrivenRun._failed(run, 1, StoppedError("stopped before the first step"))
    assert issubclass(LimitError, StoppedError) and LimitError("x").exit_code == 130


def test_a_signal_behind_a_limit_still_waits_for_the_checkpoint():
    with Signals() as signals:
        signals.limit("limits.hours")
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.name == "SIGTERM"
        signals.limit("limits.cost")
        assert signals.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_a_sweep_takes_no_limits_of_a_run():
    faults = sweep._base_faults(sweep.Sweep.model_construct(space={}), job(limits={"hours": 1.0}, evaluate=None))
    assert any(f.startswith("job: limits apply to one run. Use the sweep's budget") for f in faults)


def test_the_price_table_is_the_plans():
    assert limits._table()["devices"]["H100"]["hour"] == 6.88


class Away:
    """Reads a ledger while its store answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
        self.error, read = error, goodput.read

        def asked(run: Location) -> list[RecordedAttempt]:
            if self.error:
                raise self.error
            return read(run)

        monkeypatch.setattr(goodput, "read", asked)
        monkeypatch.setattr(time_ledger, "RETRY_S", 0.0)


@pytest.mark.parametrize("error", [StorageError("s3://x: away"), OSError("away")])
def test_a_ledger_that_cannot_be_read_at_first_is_read_again_and_said_to_be_missing_once(tmp_path, monkeypatch, caplog, error):
    """Its hours were left out for good, so a limit was reached hours late, or never."""
    store = Away(monkeypatch, error)
    watched = spending(tmp_path, {"hours": 4.0}, (5.0, 4, 0.0))
    for _ in range(20):
        assert watched.check() == ""
        time.sleep(0.01)
    assert [record.getMessage() for record in caplog.records] == [
        f"can't read the run's ledger. Until heliostat can read the ledger, goodput and limits count only this command: {error}"
    ]
    store.error = None
    until(watched.check, "limit")
    assert watched.reached == "limits.hours: the limit of 4 h is reached (5.00 h over all commands)"
    assert len(caplog.records) == 2 and "count all commands" in caplog.text


def test_a_limit_that_is_reached_without_the_ledger_says_so(tmp_path, monkeypatch):
    Away(monkeypatch, StorageError("away"))
    watched = Spending(job(limits={"hours": 1.0}), ledger(tmp_path, started=2 * HOUR))
    assert watched.check() == (
        "limits.hours: the limit of 1 h is reached (2.00 h in this command; can't read the ledger of earlier commands)"
    )


def test_a_wall_clock_that_is_set_uses_up_no_hours(tmp_path, monkeypatch):
    recorder, wall = ledger(tmp_path, (2.0, 4, 0.0), started=HOUR), time.time
    monkeypatch.setattr(time, "time", lambda: wall() + 1000 * HOUR)
    recorder.restart()
    hours, held = recorder.spent()
    assert hours == pytest.approx(3.0, abs=0.01) and held == pytest.approx(2.0 * 4 + 1.0 * 2, abs=0.01)
    monkeypatch.setattr(time, "time", lambda: wall() - 1000 * HOUR)
    assert recorder.spent()[0] == pytest.approx(3.0, abs=0.01)


def under_way(step: int) -> Course:
    """Returns the state of a run in its first attempt, from this step on."""
    return Course(Budget(job().retries), step, step, step, attempt=1, under_way=True)


@pytest.mark.parametrize("signal_too", [False, True])
def test_a_limit_reached_between_two_attempts_is_what_the_error_says(tmp_path, monkeypatch, signal_too):
    """It was a StoppedError, like that of a signal."""
    run: Any = object.__new__(DrivenRun)
    run.spending, run.signals = spending(tmp_path, {"hours": 1.0}, (2.0, 1, 0.0)), Signals()
    run.ledger, run.lease, run.job, run.course = run.spending._ledger, SimpleNamespace(lost=None), job(), under_way(5)
    run.ledger.restart = lambda **given: None
    run._beat = lambda: (DrivenRun._beat(run), signal_too and setattr(run.signals, "name", "SIGTERM"))
    error = PlacementError("no room")
    text = r"^limits\.hours: the limit of 1 h is reached .*; stopped between two attempts\. "
    text += r"Raise the limit and use --resume to continue from step 5$"
    with pytest.raises(LimitError, match=text):
        run._failed(1, error)
    run.course = under_way(5)
    with pytest.raises(LimitError, match=r"limits\.hours: the limit of 1 h is reached"):
        run._failed(1, StoppedError("stopped by SIGTERM; no checkpoint"))
    run.course = dataclasses.replace(under_way(5), under_way=False)
    after = run._stopped("after the last step", "use --resume to export and register the model")
    assert isinstance(after, LimitError) and str(after).startswith("limits.hours: the limit of 1 h is reached")
    run.spending.reached, run.signals.name = "", "SIGINT"
    with pytest.raises(StoppedError, match=r"^stopped by SIGINT between two attempts\. Use --resume to continue from step 5$"):
        run._pause(10.0)
