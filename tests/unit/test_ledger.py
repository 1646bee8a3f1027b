"""Tests the goodput ledger: each second of a run has exactly one category, and only recomputed work counts as lost."""

import dataclasses
import json
import random
import time
from functools import partial
from pathlib import Path

import pytest
from heliostat.cli.main import app
from heliostat.errors import ConfigError
from heliostat.runs import goodput
from heliostat.runs.events import Event, Goodput, ModelPhase, Phase, Saved, Steps
from heliostat.runs.goodput import PARTS, RecordedAttempt, account, report, settle
from heliostat.runs.time_ledger import Ledger, LedgerRecorder
from heliostat.storage.locations import Location
from heliostat.tracking.metrics import points
from typer.testing import CliRunner

CASES = range(300)


# accounting ----------------------------------------------------------------------------------------------------------


class History:
    """Generates a random history of a run, second by second. `useful`, `wasted`: the seconds of steps, by their fate."""

    def __init__(self, seed: int, deaths: bool = True) -> None:
        rng = random.Random(seed)
        self.attempts: list[RecordedAttempt] = []
        self.every = rng.randint(1, 7)
        steps: dict[int, float] = {}  # the run's steps as they stand, and their seconds
        self.wasted = self.unreported = 0.0
        clock, saved = 1e9 + rng.random(), 0
        for number in range(rng.randint(1, 8)):
            clock += rng.random() * 50 if number else 0.0
            start = rng.choice(range(0, saved + 1, self.every)) if deaths else saved
            self.wasted += sum(steps.pop(s) for s in [s for s in steps if s >= start])
            spent = {p: rng.random() * 5 for p in ("queued", "starting", "data", "communicating", "checkpoint", "evaluating")}
            spent["computing"], marks = 0.0, []
            for step in range(start, start + self.every * rng.randint(0, 5) + (rng.randint(0, self.every - 1) if deaths else 0)):
                steps[step] = rng.random()
                spent["computing"] += steps[step]
                marks.append((step + 1, spent["computing"]))
            saved = max(start, (start + len(marks)) // self.every * self.every)
            known = clock + sum(spent.values())
            tail = rng.random() * 3 if deaths else 0.0
            self.unreported += tail
            self.attempts.append(RecordedAttempt(
                f"a{number}", clock, known, known + tail, start, 2, restart=bool(number) and rng.random() < 0.5,
                outcome="failed" if rng.random() < 0.5 else None, pending="lost", parts=spent, marks=marks,
            ))  # fmt: skip
            clock = known + tail
        self.attempts[-1].outcome = "failed"
        self.useful = sum(steps.values())
        self.total = clock - self.attempts[0].started


def test_the_parts_add_up_to_the_wall_clock_and_none_is_negative():
    for seed in CASES:
        history = History(seed)
        parts = account(history.attempts)
        assert set(parts) == set(PARTS)
        assert sum(parts.values()) == pytest.approx(history.total, abs=1e-5), seed
        assert min(parts.values()) >= -1e-9, seed
        # lost is what was computed again, and what a dying worker had not reported
        assert parts["lost"] == pytest.approx(history.wasted + history.unreported, abs=1e-6), seed
        assert parts["computing"] == pytest.approx(history.useful, abs=1e-6), seed
        assert account(History(seed, deaths=False).attempts)["lost"] == pytest.approx(0.0, abs=1e-9), seed


@pytest.mark.parametrize("seed", range(5))
def test_the_order_in_which_the_files_are_read_does_not_matter_and_writing_them_loses_nothing(seed, tmp_path):
    attempts = History(seed).attempts
    expected = account(attempts)
    run = Location(str(tmp_path))
    for attempt in random.Random(seed).sample(attempts, len(attempts)):
        run.join("ledger", attempt.name).write(attempt.dump())
    assert goodput.read(run) == attempts
    assert account(reversed(attempts)) == expected


def test_time_between_commands_is_idle_and_between_failure_and_first_step_restarting():
    first = RecordedAttempt("a", 0.0, 100.0, 100.0, 0, 2, outcome="failed", pending="lost",
        parts={"starting": 20.0, "computing": 80.0},
                    marks=[(10, 40.0), (20, 80.0)])  # fmt: skip
    within = RecordedAttempt("b", 103.0, 150.0, 150.0, 10, 1, restart=True, outcome="interrupted", pending="lost",
                     parts={"queued": 2.0, "starting": 5.0, "computing": 40.0}, marks=[(20, 40.0)])  # fmt: skip
    later = RecordedAttempt("c", 1150.0, 1200.0, 1206.0, 20, 1, outcome="finished", pending="idle",
                    parts={"starting": 10.0, "computing": 40.0}, marks=[(30, 40.0)])  # fmt: skip
    parts = {p: s for p, s in account([first, within, later]).items() if s}
    assert parts == {"starting": 30.0, "computing": 120.0, "lost": 40.0, "restarting": 10.0, "idle": 1006.0}
    assert report([first, within, later])["goodput"] == pytest.approx(120 / 1206)


def test_a_checkpoint_that_could_not_be_read_makes_the_work_up_to_it_lost_but_keeps_what_came_before():
    """b restarted at 10, because a's 20 is damaged. c then reads 20, which belongs to a, so b leaves nothing."""
    a = RecordedAttempt("a", 0.0, 20.0, 20.0, 0, 1, pending="lost", parts={"computing": 20.0}, marks=[(10, 10.0), (20, 20.0)])
    b = RecordedAttempt("b", 20.0, 25.0, 25.0, 10, 1, pending="lost", parts={"computing": 5.0}, marks=[(15, 5.0)])
    c = RecordedAttempt(
        "c", 25.0, 35.0, 35.0, 20, 1, outcome="finished", pending="idle", parts={"computing": 10.0}, marks=[(30, 10.0)]
    )
    parts = account([a, b, c])
    assert (parts["computing"], parts["lost"]) == (30.0, 5.0)


def test_a_killed_drivers_last_mark_may_be_older_than_its_last_checkpoint():
    """Its file has 10, but the next attempt resumes from 20, so the work up to 10 isn't lost."""
    killed = RecordedAttempt("a", 0.0, 10.0, 14.0, 0, 1, pending="lost", parts={"computing": 10.0}, marks=[(10, 10.0)])
    after = RecordedAttempt(
        "b", 20.0, 30.0, 30.0, 20, 1, outcome="finished", pending="idle", parts={"computing": 10.0}, marks=[(30, 10.0)]
    )
    parts = account([killed, after])
    assert (parts["computing"], parts["lost"], parts["idle"]) == (20.0, 4.0, 6.0)


def test_a_running_attempts_unreported_seconds_are_attributed_to_nothing_yet():
    running = RecordedAttempt(
        "a", 0.0, 95.0, 100.0, 0, 1, pending="lost", parts={"starting": 15.0, "computing": 80.0}, marks=[(10, 80.0)]
    )
    found = report([running])
    assert (found["total_s"], found["attributed"], sum(found["parts"].values())) == (100.0, 0.95, 95.0)
    assert report([dataclasses.replace(running, outcome="interrupted")])["parts"]["lost"] == 5.0


def test_commands_that_overlap_in_time_still_add_up():
    one = RecordedAttempt("a", 0.0, 10.0, 10.0, 0, 1, outcome="finished", pending="idle", parts={"starting": 10.0})
    other = dataclasses.replace(one, id="b", started=4.0, known=8.0, seen=8.0, parts={"starting": 4.0})
    last = dataclasses.replace(one, id="c", started=12.0, known=13.0, seen=13.0, parts={"starting": 1.0})
    assert report([one, other, last])["parts"]["starting"] == 15.0
    assert report([one, other, last])["parts"]["idle"] == 2.0


# measuring -----------------------------------------------------------------------------------------------------------


def test_a_ledgers_parts_are_its_wall_clock_whatever_is_switched_nested_moved_or_raised():
    rng = random.Random(0)
    before = time.perf_counter()
    ledger = Ledger("starting")
    begun = time.perf_counter()
    for _ in range(2000):
        with ledger(rng.choice(PARTS)):
            if rng.random() < 0.5:
                with pytest.raises(KeyError), ledger("communicating"):
                    raise KeyError
            ledger.move("computing", "lost", rng.random())
        ledger.switch(rng.choice(PARTS))
    end = time.perf_counter()
    assert end - begun <= sum(ledger.totals().values()) + 1e-9 <= time.perf_counter() - before + 2e-9


def test_an_inner_part_interrupts_the_outer_one():
    """Each part is at least the time inside it, and at most the time around it."""
    ledger = Ledger("computing")
    before = time.perf_counter()
    with ledger("communicating"):
        inside = time.perf_counter()
        time.sleep(0.05)
        end = time.perf_counter()
    after = time.perf_counter()
    time.sleep(0.02)
    slept = time.perf_counter()
    found = ledger.totals()
    assert end - inside <= found["communicating"] <= after - before
    assert slept - after <= found["computing"] <= time.perf_counter() - before - (end - inside)


def test_compiling_is_the_first_step_less_the_second():
    ledger = Ledger("compiling")
    time.sleep(0.05)
    before = time.perf_counter()
    ledger.compiled(first=True)
    begun = time.perf_counter()
    time.sleep(0.01)
    end = time.perf_counter()
    first = ledger.totals()["compiling"]
    ledger.compiled(first=False)
    assert max(0.0, first - (time.perf_counter() - before)) <= ledger.totals()["compiling"] <= max(0.0, first - (end - begun))


def test_a_late_report_of_workers_that_have_failed_is_not_the_next_attempts(tmp_path):
    now = time.time()
    recorder = LedgerRecorder(Location(str(tmp_path)), now - 100, 0, 2)
    events = _events(now - 90, 0, (2,), 4)
    for event in events[:-1]:
        recorder.event(event)
    recorder.restart(now - 80)
    recorder.event(events[-1])
    assert [(a.start_step, a.reached) for a in recorder.attempts] == [(0, 3), (3, 3)]
    recorder.close("failed")


def test_workers_that_overtake_the_drivers_word_of_their_placing_are_one_attempt(tmp_path):
    now = time.time()
    recorder = LedgerRecorder(Location(str(tmp_path)), now - 100, 0, 2)
    model, *others = _events(now - 90, 0, (2,), 4)
    for event in [model, Phase(phase="placing", at=now - 95), *others]:
        recorder.event(event)
    assert [(a.start_step, a.reached) for a in recorder.attempts] == [(0, 4)]
    recorder.close("finished")


def _events(clock: float, start: int, saves: tuple[int, ...], until: int, ended: bool = False) -> list[Event]:
    """Returns a worker's events: 1 s for its start, then 2 s of computing and half a second of waiting for data per step."""
    seconds = {"starting": 0.0}

    def event(kind: type[Event], **facts) -> Event:
        return kind(**facts, ledger=dict(seconds), at=clock + sum(seconds.values()))

    found = [event(ModelPhase, queued_s=3.0, start_step=start, workers=2)]
    seconds["starting"] = 1.0
    found.append(event(Phase, phase="step"))
    for step in range(start, until):
        seconds["computing"] = seconds.get("computing", 0.0) + 2.0
        seconds["data"] = seconds.get("data", 0.0) + 0.5
        found.append(event(Steps, first=step, loss=[0.0], grad_norm=[0.0], lr=[0.0], seconds=1.0))
        if step + 1 in saves:
            seconds["checkpoint"] = seconds.get("checkpoint", 0.0) + 0.25
            found.append(event(Saved, step=step + 1, blocked_s=0.0))
    return [*found, event(Phase, phase="ended")] if ended else found


def test_a_recorder_splits_a_command_with_a_restart_in_it_and_its_files_tell_the_same(tmp_path):
    run, now = Location(str(tmp_path)), time.time()
    recorder = LedgerRecorder(run, now - 100, 0, 2)
    placing = partial(Phase, phase="placing")
    for event in [placing(at=now - 95), placing(at=now - 90), *_events(now - 85, 0, (2, 4), 5)]:
        recorder.event(event)
    recorder.restart(now - 60)
    for event in [placing(at=now - 58), *_events(now - 54, 4, (6,), 6, ended=True)]:
        recorder.event(event)
    recorder.close("finished")
    found = goodput.read(run)
    assert found == recorder.attempts
    parts = {p: round(s, 1) for p, s in account(found).items() if s}
    tail = found[-1].seen - found[-1].known  # the driver goes on after the workers' end
    assert parts == {
        "queued": 8.0,  # asked for room at 95 and again at 90, and that took 3 s
        "starting": 8.0,  # 5 s before, 2 s after being placed, 1 s of the worker's
        "data": 3.5,
        "computing": 12.0,
        "checkpoint": 0.8,
        "lost": 2.0 + 11.0,  # step 4, and what the workers did from their last report at 71 to their failure at 60
        "restarting": 7.0,
        "idle": round(tail, 1),
    }
    assert [a.marks for a in found] == [[(2, 4.0), (4, 8.0), (5, 10.0)], [(6, 4.0)]]


def test_a_new_worker_group_that_nobody_announced_is_a_restart(tmp_path):
    now = time.time()
    recorder = LedgerRecorder(Location(str(tmp_path)), now - 100, 0, 2)
    for event in [*_events(now - 90, 0, (2,), 3), *_events(now - 60, 2, (), 4)]:
        recorder.event(event)
    first, second = recorder.attempts
    assert (first.outcome, first.reached, second.restart, second.start_step, second.reached) == ("failed", 3, True, 2, 4)
    recorder.close("failed")


def test_a_killed_drivers_file_is_at_most_seconds_old(tmp_path):
    """Nothing closes the recorder, so the file has the state of the events so far."""
    now = time.time()
    recorder = LedgerRecorder(Location(str(tmp_path)), now - 50, 0, 2)
    for event in _events(now - 40, 0, (2,), 2):
        recorder.event(event)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and recorder.attempts != goodput.read(Location(str(tmp_path))):
        recorder.beat()  # as the driver does all the time
    (found,) = goodput.read(Location(str(tmp_path)))
    assert found.outcome is None and found.reached == 2
    assert found.known == pytest.approx(now - 40 + 6.25, abs=0.01)
    assert now <= found.seen <= time.time()


def test_a_resumed_command_counts_what_earlier_ones_did_and_damage_to_their_files_stops_nothing(tmp_path, caplog):
    run, now = Location(str(tmp_path)), time.time()
    run.join("ledger", "attempt-20260101T000000.000Z-abc.json").write(
        RecordedAttempt("abc", now - 500, now - 450, now - 450, 0, 1, outcome="failed", parts={"starting": 50.0}).dump()
    )
    assert LedgerRecorder(run, now - 10, 0, 1).report()["parts"]["idle"] == pytest.approx(440, abs=5)
    run.join("ledger", "attempt-20260101T000000.000Z-abc.json").write(b"{")
    assert LedgerRecorder(run, now - 10, 0, 1).report()["total_s"] == pytest.approx(10, abs=5)
    assert "can't read the run's ledger" in caplog.text and "isn't a valid ledger of an attempt" in caplog.text
    with pytest.raises(ConfigError, match="isn't a valid ledger of an attempt"):
        goodput.read(run)


def test_a_store_that_refuses_the_ledger_costs_a_warning_only(tmp_path, caplog):
    (tmp_path / "ledger").write_text("a file lies where a folder is needed")
    recorder = LedgerRecorder(Location(str(tmp_path)), time.time() - 5, 0, 1)
    recorder.close("finished")
    assert "can't update the run's ledger yet" in caplog.text


# showing -------------------------------------------------------------------------------------------------------------


def test_the_command_prints_shares_that_add_up_to_100_percent_a_column_for_each_attempt_and_json(tmp_path):
    attempts = History(3).attempts
    for attempt in attempts:
        Location(str(tmp_path)).join("ledger", attempt.name).write(attempt.dump())
    printed = CliRunner().invoke(app, ["run", "goodput", str(tmp_path)])
    assert printed.exit_code == 0, printed.output
    head, *rows, total, steps = printed.stdout.splitlines()
    assert head.split()[:3] == ["part", "seconds", "share"] and head.count("attempt") == len(attempts) > 1
    shares = [float(row.split()[2].rstrip("%")) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(rows)) and total.split()[2] == "100.0%"
    each = [float(cell) for cell in total.split()[3:]]
    assert sum(each) == pytest.approx(float(total.split()[1].replace(",", "")), abs=0.05 * len(each) + 0.05)
    assert steps.startswith("steps")
    told = CliRunner().invoke(app, ["run", "goodput", str(tmp_path), "--json"])
    assert json.loads(told.stdout.splitlines()[-1]) == report(attempts)


def test_a_run_without_a_ledger_is_one_clear_error(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    result = CliRunner().invoke(app, ["run", "goodput", str(tmp_path)])
    assert isinstance(result.exception, ConfigError) and "has no ledger/" in str(result.exception)


def test_mlflow_gets_every_part_and_the_fraction(tmp_path):
    found = report(History(3).attempts)
    logged = points(Goodput(report=found, step=7, at=1.0))
    assert {key: value for key, value, _, _ in logged} == {
        "train/time/goodput": found["goodput"], "train/time/worker_hours": found["worker_hours"],
        **{f"train/time/{p}_s": s for p, s in found["parts"].items()},
    }  # fmt: skip
    goodput.chart(found).savefig(tmp_path / "goodput.png")
    assert (Path(tmp_path) / "goodput.png").read_bytes().startswith(b"\x89PNG")


def test_settling_changes_no_attempt():
    attempts = History(5).attempts
    before = [a.dump() for a in attempts]
    settle(attempts)
    assert [a.dump() for a in attempts] == before
