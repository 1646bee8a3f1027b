"""Tests that a driver's next action depends only on the run's state and one event. Messages of an ended attempt don't count."""

import dataclasses
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from heliostat import errors
from heliostat.config import spec
from heliostat.errors import HeliostatError, StoppedError, TrainingError
from heliostat.training.driver import run, states
from heliostat.training.driver.recovery import Budget
from heliostat.training.driver.states import ENDS, Course, RunState, follow
from heliostat.training.stops import INTERRUPTED, PREEMPTED, RESIZE, RUN

S = RunState
RETRIES = spec.Retries(max=3, backoff=1.0, backoff_max=4.0)


def course(state: RunState = S.STARTING, **other: Any) -> Course:
    facts: dict[str, Any] = {"start": 20, "saved": 20, "done": 27, "attempt": 3, "state": state, **other}
    return Course(Budget(RETRIES), **facts)


# courses that a run takes --------------------------------------------------------------------------------------------


def played(*events: states.RunEvent) -> tuple[Course, list[states.Action]]:
    now, actions = Course(Budget(RETRIES), 0, 0, 0), list[states.Action]()
    for event in events:
        now, more = follow(now, event)
        actions += more
    return now, actions


def test_a_run_that_nothing_happens_to():
    now, actions = played(
        states.Begin(), states.WorkerMessage(1, "Steps", 1), states.Stopped(1, RUN, 40), states.CommandEnded(S.FINISHED)
    )  # fmt: skip
    assert (now.state, now.restarts, now.dropped) == (S.FINISHED, 0, 0)
    assert actions == [states.StartWorkers(1), states.Take()]


def test_a_failure_is_counted_once_and_its_late_messages_change_nothing():
    error = TrainingError("worker 1 died")
    before = states.Begin(), states.WorkerMessage(1, "Steps", 12), states.Failed(1, error), states.CheckpointFound(10)
    now, actions = played(*before)
    assert (now.state, now.start, now.saved, now.done, now.budget.used, now.restarts) == (S.RECOVERING, 10, 10, 10, 1, 1)
    assert actions[-3:] == [
        states.Restart("failed", "worker 1 died"),
        states.GoBack(10),
        states.Wait(0.0, "worker 1 died. Resuming from step 10 in 0 s (retry 1 of 3)"),
    ]
    late = states.WorkerMessage(1, "Steps", 15), states.Failed(1, TrainingError("late")), states.Stopped(1, RUN, 40)
    for between in ((), (states.Begin(),)):  # before and after the next attempt begins
        still = played(*before, *between)[0]
        after, dropped = played(*before, *between, *late)
        assert after == dataclasses.replace(still, dropped=3)
        assert [one.what for one in dropped if isinstance(one, states.Drop)] == ["Steps", "Failed", "Stopped"]


def test_a_resize_goes_on_from_the_step_behind_which_the_workers_stopped():
    now, actions = played(
        states.Begin(), states.WorkerMessage(1, "Steps", 9), states.Stopped(1, RESIZE, 10), states.Begin()
    )  # fmt: skip
    assert (now.state, now.start, now.attempt, now.budget.used) == (S.RESIZING, 10, 2, 0)
    assert states.Restart("resize") in actions


def test_copies_in_memory_are_tried_once_until_workers_have_made_a_step_from_them():
    began = states.Begin(), states.CopiesFound(1, 7)
    assert played(*began)[0].start == 7 and not played(*began)[0].trust_memory
    assert played(*began, states.WorkerMessage(1, "Steps", 8))[0].trust_memory
    again = played(*began, states.Failed(1, TrainingError("x")), states.CheckpointFound(0), states.Begin())[0]
    assert again.start == 0
    with pytest.raises(RuntimeError, match="CopiesFound can't happen"):
        follow(again, states.CopiesFound(2, 7))


@pytest.mark.parametrize(
    ("error", "forgotten"),
    [
        (errors.CorruptCheckpointError("torn", 20), True),
        (errors.CorruptionError("bits", ["n"], 10), True),
        (errors.LossSpikeError("high", 15), True),
        (TrainingError("died"), False),
    ],
)
def test_copies_that_a_failure_leaves_in_doubt_are_forgotten_before_a_checkpoint_is_looked_for(error, forgotten):
    actions = follow(course(S.RUNNING, under_way=True), states.Failed(3, error))[1]
    assert actions == ((states.ForgetCopies(),) if forgotten else ()) + (states.FindCheckpoint(error),)


def test_a_spikes_samples_are_left_out_after_the_checkpoint():
    failed = follow(course(S.RUNNING, under_way=True), states.Failed(3, errors.LossSpikeError("high", 25)))[0]
    assert states.GoBack(20, (24, 25)) in follow(failed, states.CheckpointFound(20))[1]
    assert states.GoBack(25, (25, 25)) in follow(failed, states.CheckpointFound(25))[1]


def test_what_was_done_about_a_node_follows_the_error_as_a_sentence_of_the_reason():
    failed = follow(course(S.RUNNING, under_way=True), states.Failed(3, TrainingError("worker 1 died")))[0]
    actions = follow(failed, states.CheckpointFound(20, ("Excluded until this command ends: node a",)))[1]
    assert states.Restart("failed", "worker 1 died. Excluded until this command ends: node a") in actions


# messages of another attempt ------------------------------------------------------------------------------------------


def kinds() -> list[str]:
    """Returns the classes of all events that workers post."""
    from heliostat.runs import events

    return sorted(name for name, one in vars(events).items() if isinstance(one, type) and issubclass(one, events.Event))


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize(("number", "under_way"), [(2, True), (4, True), (3, False)])
def test_a_message_of_another_attempt_or_of_one_that_has_ended_is_dropped_and_counted(kind, number, under_way):
    """Reports, saves, spikes, evaluations, corruption checks, profiles, and times are all such messages."""
    before = course(S.RECOVERING, under_way=under_way)
    after, actions = follow(before, states.WorkerMessage(number, kind, 30))
    assert actions == (states.Drop(number, kind),) and after == dataclasses.replace(before, dropped=1)


def test_the_driver_hands_on_no_message_of_another_attempt():
    """MLflow, the ledger, and the terminal don't get it."""
    from heliostat.runs.events import Saved, Steps

    driven: Any = object.__new__(run.DrivenRun)
    driven.job, driven.course = None, course(S.RUNNING, under_way=True)
    for event in (Saved(step=30, blocked_s=0.0), Steps(first=29, loss=[1.0], grad_norm=[1.0], lr=[0.1], seconds=1.0)):
        driven._take(2, event)  # has neither an owner nor a ledger: AttributeError if it were taken
    assert (driven.course.dropped, driven.course.done) == (2, 27)


# random courses -------------------------------------------------------------------------------------------------------

ERRORS: list[HeliostatError] = [
    TrainingError("died"),
    errors.WorkerError("TypeError"),
    errors.PlacementError("no room"),
    errors.ConfigError("bad"),
    errors.NonFiniteError("nan"),
    errors.AccessError("refused"),
    errors.LossSpikeError("high", 5),
    errors.CorruptCheckpointError("torn", 5),
    errors.CorruptionError("bits", ["n"], 3),
    StoppedError("stopped"),
]


def drawn(draw: random.Random, now: Course) -> states.RunEvent:
    """Draws an event of any attempt so far, or of the next one, in any order."""
    number = draw.choice([now.attempt] * 4 + [draw.randrange(now.attempt + 2)])
    step = draw.randrange(now.saved, now.saved + 20)
    return draw.choice(
        [
            states.Begin(),
            states.Begin(),
            states.CopiesFound(number, step),
            states.WorkerMessage(number, "Steps", step),
            states.WorkerMessage(number, "Notice"),
            states.Stopped(number, draw.choice([RUN, RESIZE, PREEMPTED, INTERRUPTED]), step, draw.choice(["", "limits.hours"])),
            states.Failed(number, draw.choice(ERRORS), draw.random() < 0.1),
            states.CheckpointFound(draw.choice([now.saved, now.saved, step, 0])),
            *([states.Asked(StoppedError("asked"))] * (draw.random() < 0.1)),
            *([states.CommandEnded(draw.choice([*ENDS]))] * (draw.random() < 0.1)),
        ]
    )


def of_another(now: Course, event: states.RunEvent) -> bool:
    number = getattr(event, "attempt", None)
    return number is not None and (number != now.attempt or not now.under_way)


@pytest.mark.parametrize("tens", range(20))
def test_whatever_happens_in_whatever_order_each_failed_attempt_is_counted_once_and_nothing_of_an_earlier_one_counts(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        check_course(seed)


def check_course(seed: int) -> None:
    """Checks the properties of every sequence of states, over sixty events in any order."""
    draw, now = random.Random(seed), Course(Budget(RETRIES), 0, 0, 0)
    cause: HeliostatError | None = None  # of the attempt that has failed
    counted = Counter[int]()
    in_a_row = 0
    for _ in range(60):
        event, before = drawn(draw, now), now
        try:
            now, actions = follow(before, event)
        except RuntimeError:
            assert not of_another(before, event), "what comes late is no error of the driver's"
            continue
        if of_another(before, event):
            assert now == dataclasses.replace(before, dropped=before.dropped + 1)
            assert [type(one) for one in actions] == [states.Drop]
            continue
        if before.state in ENDS:
            assert now == before and not actions, "an end is final"
            continue
        assert now.attempt - before.attempt == isinstance(event, states.Begin)
        assert now.dropped == before.dropped
        if isinstance(event, states.Failed):
            assert not now.under_way
            cause = event.error
        for action in actions:
            match action:
                case states.Restart(outcome=outcome, reason=reason):
                    counted[now.attempt] += 1
                    assert reason == (str(cause) if outcome == "failed" else ""), "the cause is the first error of this attempt"
                case states.Wait(seconds=seconds):
                    assert 0 <= seconds <= RETRIES.backoff_max, "every wait ends"
                case states.Raise(error=error):
                    assert now.state in (S.FAILED, S.STOPPED)
                    if not isinstance(error, StoppedError):
                        assert str(error).startswith(str(cause)) and type(error) is type(cause)
        if isinstance(event, states.CheckpointFound) and now.state not in ENDS:
            in_a_row = 1 if event.step > before.budget.checkpoint else in_a_row + 1
            assert now.start == now.saved == event.step and in_a_row <= RETRIES.max
        if isinstance(event, states.Stopped) and event.stop in (RESIZE, PREEMPTED):
            assert now.start == now.saved == event.step, "no step is lost"
            assert now.budget == before.budget, "it is no failure"
        if isinstance(event, states.Begin):
            assert now.start == before.saved
    assert all(times == 1 for times in counted.values()) and now.restarts == sum(counted.values())


def test_random_courses_reach_every_state_and_every_action():
    """Otherwise the test above proves little."""
    seen: set[Any] = set()
    for seed in range(100):
        draw, now = random.Random(seed), Course(Budget(RETRIES), 0, 0, 0)
        for _ in range(60):
            try:
                now, actions = follow(now, drawn(draw, now))
            except RuntimeError:
                continue
            seen |= {now.state, *map(type, actions)}
    assert seen >= {*RunState, *get_args(states.Action)}


# the table in the docs ------------------------------------------------------------------------------------------------

EVENTS: dict[str, states.RunEvent] = {  # by the words of the table; a failure's are those of `recovery.classify`
    "the driver begins an attempt": states.Begin(),
    "intact in-memory copies are newer than the checkpoint": states.CopiesFound(3, 24),
    "workers report steps": states.WorkerMessage(3, "Steps", 28),
    "another message of this attempt": states.WorkerMessage(3, "Saved"),
    "a message or a result of another attempt": states.WorkerMessage(2, "Steps", 28),
    "the workers have made the last step": states.Stopped(3, RUN, 40),
    "the workers have stopped for a resize or a node that goes": states.Stopped(3, RESIZE, 30),
    "the workers have stopped for a signal or a limit": states.Stopped(3, INTERRUPTED, 30),
    "the attempt fails: final error, or a refusal that the driver meets too": states.Failed(3, errors.ConfigError("x")),
    "the attempt fails: no room for the workers": states.Failed(3, errors.PlacementError("x")),
    "the attempt fails: corrupt checkpoint, corruption, or loss spike": states.Failed(3, errors.LossSpikeError("x", 25)),
    "the attempt fails: anything else": states.Failed(3, TrainingError("x")),
    "a signal before the first step ends the attempt": states.Failed(3, StoppedError("x")),
    "a checkpoint to go back to is found": states.CheckpointFound(20),
    "the same, with all retries used": states.CheckpointFound(20),
    "a signal or a limit while no workers run": states.Asked(StoppedError("x")),
    "an earlier command has made all steps": states.AllDone(),
    "the command has completed": states.CommandEnded(S.FINISHED),
    "an interrupt, or an error outside of an attempt": states.CommandEnded(S.FAILED),
}
UNDER_WAY = (states.CopiesFound, states.WorkerMessage, states.Stopped, states.Failed)


def rows() -> list[str]:
    """Returns the rows of the table: for each event, its possible states, the following state, and the driver's actions."""
    table = ["| what happens | in state | next state | what the driver does |", "|---|---|---|---|"]
    for words, event in EVENTS.items():
        outcomes: dict[str, list[tuple[RunState, RunState]]] = {}
        for state in RunState:
            found = isinstance(event, states.CheckpointFound)
            before = course(
                state,
                attempt=0 if isinstance(event, states.AllDone) else 3,
                under_way=isinstance(event, UNDER_WAY) and state not in (S.FINALIZING, *ENDS),
                failure=TrainingError("x") if found and state is S.RECOVERING else None,
            )
            if "all retries" in words:
                before = dataclasses.replace(before, budget=Budget(RETRIES, RETRIES.max, 20))
            try:
                after, actions = follow(before, event)
            except RuntimeError:
                continue
            if words != "a message or a result of another attempt" and [type(one) for one in actions] == [states.Drop]:
                continue  # of an attempt that has ended: the row of its own
            does = ", ".join((type(one).__doc__ or "").partition(".")[0] for one in actions).lower().replace("mlflow", "MLflow")
            outcomes.setdefault(does or "-", []).append((state, after.state))
        for does, pairs in outcomes.items():
            for following, present in grouped(pairs):
                table.append(f"| {words} | {present} | {following} | {does} |")
    return table


def grouped(pairs: list[tuple[RunState, RunState]]) -> list[tuple[str, str]]:
    """Groups states by the following one; in one row, if all lead to the same state, or each stays."""
    leads = {after for _, after in pairs}
    if len(leads) == 1 or all(before is after for before, after in pairs):
        present = "any" if len(pairs) == len(RunState) else ", ".join(before for before, _ in pairs)
        return [(leads.pop() if len(leads) == 1 else "the same", present)]
    kept = [pair for pair in pairs if pair[0] is pair[1]]
    return [row for part in ([pair for pair in pairs if pair not in kept], kept) for row in grouped(part)]


def test_the_documents_table_of_states_and_events_is_the_codes():
    text = Path(__file__).parents[2].joinpath("docs/reliability/driver-states.md").read_text(encoding="utf-8")
    found = re.search(r"(\| what happens \| in state .*?)\n\n", text, re.S)
    expected = "\n".join(rows())
    assert found and found[1] == expected, f"docs/reliability/driver-states.md: the table is\n{expected}"


def test_the_table_has_every_event_of_a_run():
    assert {type(event) for event in EVENTS.values()} == set(get_args(states.RunEvent))


def test_each_end_has_a_status_in_mlflow():
    assert set(run.ENDS) == ENDS
