"""Tests that a run's last checkpoint and its ledger show how it ended, if no command could record the end."""

import json

import pytest
from heliostat.checkpoint import layout
from heliostat.checkpoint.index import build
from heliostat.runs import summary
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage import run_folder
from heliostat.storage.locations import Location

from tests.unit.build_index import index
from tests.unit.build_job import job

METRICS = {"train_loss": 2.0 / 3.0, "loss": 0.1 + 0.2, "accuracy": 0.7}


def attempts() -> list[RecordedAttempt]:
    """Returns a command of 30 steps, one that resumed at 20, restarted at 60, and reached 100, and two that died during their
    conclusion."""
    made = [
        RecordedAttempt("a", 0.0, 50.0, 50.0, 0, 2, parts={"starting": 9.0, "computing": 30.0}, marks=[(30, 30.0)]),
        RecordedAttempt("b", 60.0, 100.0, 100.0, 20, 2, outcome="failed",
                        parts={"starting": 4.0, "queued": 2.0, "computing": 40.0},
                marks=[(60, 40.0)]),
        RecordedAttempt("c", 100.0, 160.0, 160.0, 60, 2, restart=True, marks=[(80, 10.0), (100, 20.0)],
                parts={"starting": 5.0, "computing": 20.0, "data": 4.0, "communicating": 1.0, "checkpoint": 0.5}),
        RecordedAttempt("d", 170.0, 175.0, 175.0, 100, 2),
        RecordedAttempt("e", 180.0, 185.0, 185.0, 100, 2),
    ]  # fmt: skip
    return [made[i] for i in (3, 1, 4, 0, 2)]


def test_scores_are_the_checkpoints_to_the_bit_and_rates_the_ledgers():
    found = summary.from_checkpoint(100, METRICS, job(), attempts())
    assert found["steps"] == 100 and found["train_loss"] == 2.0 / 3.0
    assert found["eval"] == {"loss": 0.1 + 0.2, "accuracy": 0.7}
    assert found["tokens_per_second"] == pytest.approx(40 * 8 * 64 / 25)  # of the attempt that made the last steps
    assert found["data_wait"] == pytest.approx(4 / 25) and found["checkpoint_blocked_s"] == 0.5
    assert found["seconds_to_first_step"] == 6.0 and found["restarts"] == 1  # of the command that made them


def test_a_run_without_a_ledger_has_a_summary_too():
    found = summary.from_checkpoint(100, METRICS, job(), [])
    assert found["train_loss"] == 2.0 / 3.0 and found["tokens_per_second"] == found["data_wait"] == found["restarts"] == 0


def test_a_summary_or_result_counts_for_the_step_that_it_is_of(tmp_path, caplog):
    """It doesn't count for a longer training. A damaged one is made again, also if the ledger is damaged and can't contribute."""
    run, last = Location(str(tmp_path)), layout.SavedCheckpoint(Location(str(tmp_path)), build(index(100, metrics=METRICS), 100))
    summary.write(run, {"steps": 90, "train_loss": 9.0})
    assert summary.read(run, last, job())["train_loss"] == 2.0 / 3.0
    summary.write(run, {"steps": 100, "train_loss": 1.0})
    assert summary.read(run, last, job()) == {"steps": 100, "train_loss": 1.0}
    for text in (b"{", b"[]", json.dumps({"steps": 90}).encode()):
        run.join(run_folder.RESULT).write(text)
        assert summary.result(run, 100) is None
    run.join(run_folder.SUMMARY).write(b"")
    run.join(run_folder.LEDGER, "attempt-1.json").write(b"{")
    assert (
        summary.read(run, last, job())["tokens_per_second"] == 0.0
        and "rates and times of the training aren't known" in caplog.text
    )
