"""Tests that chaos measures a fault from the run's records: times from the fault, and recomputed steps."""

import random
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from heliostat.chaos import experiment, faults, measure
from heliostat.chaos.measure import FaultEffect
from heliostat.chaos.process import ChaosError, Command
from heliostat.checkpoint import layout
from heliostat.cli.train import ISSUE, _chaos_cells, chaos_table
from heliostat.errors import ConfigError
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location
from typer.testing import CliRunner

from tests.unit.build_job import job

REPORT = {"ok": True, "steps": 60, "lost": 0, "repeated": 0, "replaced": 0, "first_difference": None}


def attempt(started: float, seen: float, first: int, reached: int, outcome: str | None) -> RecordedAttempt:
    return RecordedAttempt(f"{started}", started, seen, seen, first, 2, outcome=outcome, marks=[(reached, 1.0)])


def said(at: float, step: int) -> tuple[float, str]:
    return at, f"04:01:02 step {step}/60  loss 2.3456  lr 1.00e-03  100 tokens/s  data wait 0.0%  ETA 3 s"


def killed_at_100() -> FaultEffect:
    """Returns a run that is killed at 100 s after step 23. The failure is noticed at 102 s, and the run resumes from step 20 at
    110 s."""
    lines = [said(90 + i / 10, i) for i in range(1, 24)]
    lines += [(102.0, "04:01:02 a worker died. Resuming from step 20 in 1 s")]
    lines += [said(110 + i, 20 + i) for i in range(1, 5)]
    attempts = [attempt(50, 102, 0, 23, "failed"), attempt(102, 130, 20, 60, "finished")]
    return FaultEffect(100.0, None, None, lines, attempts)


def test_recovery_ends_with_the_first_step_that_is_new():
    """Steps 21 to 23 are recomputed. The run makes progress again at step 24."""
    found = killed_at_100()
    assert measure.detected_s(found) == 2.0 and measure.recovered_s(found) == 14.0
    assert measure.recomputed_steps(found.attempts) == 3


def test_a_fault_that_ends_no_attempt_is_told_by_what_was_said():
    found = FaultEffect(100.0, 100.5, 107.0, [said(100.1, 30), said(100.2, 31)], [attempt(50, 130, 0, 60, "finished")])
    assert (measure.detected_s(found), measure.recovered_s(found), measure.recomputed_steps(found.attempts)) == (0.5, 7.0, 0)
    on = FaultEffect(100.0, 100.5, None, [said(100.1, 30), said(100.2, 31)], found.attempts)
    assert measure.recovered_s(on) == pytest.approx(0.1)  # training went on with the next step


def test_several_restarts_add_up_and_a_stop_behind_a_checkpoint_costs_no_step():
    attempts = [attempt(0, 9, 0, 23, "failed"), attempt(10, 19, 20, 31, "interrupted"), attempt(20, 29, 31, 40, "failed"),
                attempt(30, 39, 30, 60, "finished")]  # fmt: skip
    random.Random(0).shuffle(attempts)
    assert measure.recomputed_steps(attempts) == 3 + 0 + 10


def test_what_is_lost_repeated_or_unlogged_is_a_problem_and_nothing_else_is():
    steps = list(range(1, 61))
    good = measure.row("hang", killed_at_100(), REPORT, 2.0, 2.0, 0.5)
    assert good["loss_difference"] == 0 and measure.problems(good, REPORT, steps, 60) == []
    for changes, curve, words in (
        ({"lost": 16, "ok": False}, steps, "lost 16 samples"),
        ({"repeated": 1, "ok": False}, steps, "repeated 1"),
        ({"steps": 59}, steps, "receipts differ"),
        ({}, [*steps, 60], "MLflow doesn't have the loss of every step"),
        ({}, steps[:-1], "MLflow doesn't have"),
    ):
        report = {**REPORT, **changes}
        row = measure.row("hang", killed_at_100(), report, 2.0, 2.0, 0.5)
        assert words in "; ".join(measure.problems(row, report, curve, 60))


def test_a_run_that_did_not_end_has_a_row_without_numbers():
    row = measure.broken("kill-node")
    assert list(row) == list(measure.row("x", killed_at_100(), REPORT, 1, 1, 1)) and set(_chaos_cells(row)) == {"kill-node", "-"}
    head, only = chaos_table([row])
    assert len(head) == len(only) == len(row)


def test_faults_strike_at_any_moment_and_by_the_seed():
    """Faults strike before the first checkpoint, during a save, and within a step, but early enough for the parts of the run that
    they need."""
    moments = [faults.when(faults.rng(seed, "hang"), steps=60, every=5) for seed in range(400)]
    assert moments == [faults.when(faults.rng(seed, "hang"), 60, 5) for seed in range(400)]
    assert min(moments) < 3 and max(moments) > 46 and all(1 <= m <= 60 - 2 * 5 - 1 for m in moments)
    assert len({int(m) for m in moments}) > 40 and len({round(m % 1, 1) for m in moments}) >= 10
    assert sum(int(m) % 5 == 0 for m in moments) > 40  # behind these steps a checkpoint is saved


def test_a_moment_within_a_step_is_as_far_into_it_as_steps_are_long():
    assert measure.pace_s([said(10.0, 1), (10.5, "evaluating"), said(12.0, 5), said(13.0, 7)]) == 0.5
    assert measure.pace_s([]) == measure.pace_s([said(10.0, 1)]) == 0.0


def test_a_model_that_is_registered_twice_or_not_at_all_is_a_problem():
    assert measure.unregistered(1, expected=True) == measure.unregistered(0, expected=False) == []
    assert measure.unregistered(2, expected=True) == ["the run's model was registered 2 times"]
    assert measure.unregistered(0, expected=True) and measure.unregistered(1, expected=False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("kill-wroker", r"unknown fault \(kill-wroker\). Did you mean 'kill-worker'"),
        ("sigterm,hang,hang", r"^--faults: a fault is listed twice \(hang\)\. List each fault once"),
        ("", r"^--faults: the list is empty\. Use one or more of: kill-worker, "),
    ],
)
def test_a_wrong_list_of_faults_is_one_clear_error(given, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        experiment.choose([n for n in given.split(",") if n])


def test_every_fault_of_the_default_is_one_and_the_command_shows_them():
    from heliostat.cli.main import app

    assert [f.name for f in experiment.choose(ISSUE.split(","))] == ISSUE.split(",")
    assert "--faults" in CliRunner().invoke(app, ["debug", "chaos", "--help"]).output


def test_what_this_machine_cannot_do_is_said_before_anything_starts(monkeypatch):
    monkeypatch.setattr(faults.os, "geteuid", lambda: 1000)
    assert faults.no_disk(job()) == "mounts a small tmpfs, which needs root"
    assert "workers.gpus must be 0" in str(faults.cannot_make_nodes(job(**{"workers.gpus": 1})))


@pytest.mark.parametrize("over", [False, True])
def test_a_driver_is_killed_behind_the_last_checkpoint_or_the_fault_says_that_it_came_too_late(tmp_path, over):
    """A run that ended before the fault wasn't broken, and must not count as a survivor."""
    wanted = job(**{"train.steps": 60, "storage": str(tmp_path)})
    scene = faults.Scene(SimpleNamespace(job=wanted), tmp_path, 3.5, 0.2, random.Random(1), ExitStack(), Location(str(tmp_path)),
                         "", 0, late_s=0.2, name="late")  # fmt: skip
    command = Command([], tmp_path / "log")
    command.process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({0 if over else 60})"])
    command.until = lambda condition, *_: wait(condition)  # type: ignore[method-assign]
    index = layout.folder(scene.run, 60).join(layout.INDEX)

    def wait(condition) -> None:
        assert not condition()
        index.write(b"{}")
        assert condition()
        if over:
            command.process.wait(30)

    if over:
        with pytest.raises(ChaosError, match=r"the run ended before the fault was due\. Try another --seed"):
            faults.kill_driver_late(scene, command)
    else:
        faults.kill_driver_late(scene, command)
        assert command.process.wait(30) == -signal.SIGKILL and scene.struck > 0


def test_what_chaos_waits_for_in_a_run_s_log_is_what_a_run_says():
    """Otherwise a fault waits for words that never come, and its row isn't valid."""
    package = Path(faults.__file__).parents[1]
    said = "".join(file.read_text() for file in package.rglob("*.py") if file.parent.name != "chaos")
    words = {word for fault in faults.FAULTS.values() for word in (fault.notice, fault.cured) if word} | {faults.AGAIN}
    assert len(words) > 3
    assert [word for word in words if word.removeprefix(signal.SIGTERM.name) not in said] == []
