"""Tests the driver's orders to an attempt's workers: they depend only on its state and one event, and every wait for the workers
ends."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from heliostat.errors import HeliostatError, LeaseError, StalledError, StoppedError
from heliostat.training.driver import orders
from heliostat.training.driver.orders import WorkerWatch, decide
from heliostat.training.stops import INTERRUPTED, PREEMPTED, RESIZE, RUN

PHASES = ("placing", "model", "restore", "data", "step", "stepped", "ended")
NOW = 1000.0


def watch(phase: str = "stepped", **other: Any) -> WorkerWatch:
    return WorkerWatch(grace=60.0, settle=10.0, hear=2.0, phase=phase, **other)


def played(at: WorkerWatch, *events: orders.AttemptEvent) -> tuple[WorkerWatch, list[orders.AttemptAction]]:
    actions = list[orders.AttemptAction]()
    for event in events:
        at, action = decide(at, event)
        actions += [action] if action else []
    return at, actions


def test_once_a_worker_has_failed_the_others_are_ordered_to_abort_once_and_ended_if_they_do_not():
    at, actions = played(watch(), orders.WorkerEnded(True, NOW), orders.WorkerEnded(True, NOW + 5), orders.Clock(NOW + 11))
    assert actions == [orders.OrderAbort()] and at.back_by == NOW + 12, "they may hear of it late, and then have ten seconds"
    assert decide(at, orders.Clock(NOW + 12))[1] == orders.EndLate()


def test_workers_that_end_in_peace_are_waited_for_a_while_and_not_aborted_before_one_fails():
    at, actions = played(watch(), orders.WorkerEnded(False, NOW))
    assert not actions and at.back_by == NOW + 10
    at, actions = played(at, orders.WorkerEnded(True, NOW + 9))
    assert actions == [orders.OrderAbort()] and at.back_by == NOW + 12


def test_a_signal_after_the_grace_of_a_node_that_goes_has_a_grace_of_its_own():
    at, actions = played(watch(), orders.NodesLeaving(1, NOW), orders.StopAsked("SIGTERM", NOW + 30), orders.Clock(NOW + 61))
    assert [one.code for one in actions if isinstance(one, orders.OrderStop)] == [PREEMPTED, INTERRUPTED] and len(actions) == 2
    at, actions = played(at, orders.Clock(NOW + 91), orders.Clock(NOW + 92))
    assert len(actions) == 1 and isinstance(at.fault, StoppedError)
    assert (
        str(at.fault)
        == "stopped by SIGTERM: the workers wrote no checkpoint within checkpoint.grace (60 s). Raise checkpoint.grace"
    )
    assert isinstance(played(watch(), orders.NodesLeaving(1, NOW), orders.Clock(NOW + 61))[0].fault, StalledError)


@pytest.mark.parametrize("phase", PHASES[:4])
def test_a_signal_before_the_first_step_needs_no_checkpoint(phase):
    fault = decide(watch(phase), orders.StopAsked("SIGINT", NOW))[0].fault
    assert str(fault) == "stopped by SIGINT before the first step. No progress was lost" and isinstance(fault, StoppedError)


def test_the_first_reason_to_give_up_stays():
    """A stall at the same moment hid that another driver had taken the run over."""
    lost = LeaseError("taken over")
    at, actions = played(watch(), orders.FaultFound(lost), orders.FaultFound(StalledError("x")), orders.StopAsked("SIGTERM", NOW))
    assert at.fault is lost and actions == [orders.GiveUp(lost)]


# random sequences -----------------------------------------------------------------------------------------------------


def drawn(seed: int) -> Iterator[orders.AttemptEvent]:
    """Draws forty events in any order, at ascending times."""
    draw, now = random.Random(seed), NOW
    for _ in range(40):
        now += draw.choice([0.0, 0.5, 5.0, 40.0])
        yield draw.choice(
            [
                orders.PhaseBegun(draw.choice(PHASES)),
                orders.PhaseBegun("stepped"),
                orders.StopAsked("SIGTERM", now),
                orders.NodesLeaving(2, now),
                orders.RoomFound(4),
                orders.WorkerEnded(draw.random() < 0.5, now),
                orders.Clock(now),
                orders.Clock(now),
                *([orders.FaultFound(StalledError(f"at {now}"))] * (draw.random() < 0.2)),
            ]
        )


@pytest.mark.parametrize("tens", range(10))
def test_whatever_happens_in_whatever_order_no_order_is_taken_back_and_no_wait_is_without_an_end(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        check_orders(seed)


def check_orders(seed: int) -> None:
    """Checks the properties of every sequence of events."""
    at, fault = watch("placing"), list[HeliostatError]()
    for event in drawn(seed):
        before = at
        at, action = decide(before, event)
        assert at.ordered >= before.ordered and at.aborted >= before.aborted and at.back_by >= NOW
        assert at.fault is before.fault or before.fault is None
        match action:
            case orders.OrderStop(code=code):
                assert code == at.ordered > before.ordered and before.fault is None
                assert code == RESIZE or at.stop_by < math.inf
            case orders.OrderAbort():
                assert not before.aborted and at.aborted
            case orders.EndLate():
                assert isinstance(event, orders.Clock) and event.now >= at.back_by
            case orders.GiveUp(error=error):
                fault.append(error)
        if isinstance(event, orders.WorkerEnded):
            assert at.back_by < math.inf and (at.aborted or not event.failed)
        if isinstance(event, orders.Clock):
            over = event.now >= at.back_by or (event.now > at.stop_by and at.fault is None)
            assert not over or action is not None, "a deadline has passed, and nothing follows"
    assert fault == ([at.fault] if at.fault else [])


def test_random_sequences_reach_every_action():
    seen = {type(action) for seed in range(100) for action in played(watch("placing"), *drawn(seed))[1]}
    assert seen == set(get_args(orders.AttemptAction))


# the table in the docs ------------------------------------------------------------------------------------------------

ASKED = "a signal or a limit stops the run"
EVENTS: list[tuple[str, orders.AttemptEvent]] = [
    ("a phase begins", orders.PhaseBegun("stepped")),
    (ASKED, orders.StopAsked("SIGTERM", NOW)),
    ("nodes of the workers are about to go", orders.NodesLeaving(1, NOW)),
    ("there is room for more workers", orders.RoomFound(4)),
    ("a worker fails", orders.WorkerEnded(True, NOW)),
    ("a worker ends in peace", orders.WorkerEnded(False, NOW)),
    ("a stall, a lost lease, a mailbox that died", orders.FaultFound(StalledError("x"))),
    ("no checkpoint within `checkpoint.grace`", orders.Clock(NOW)),
    ("a worker is not back in time", orders.Clock(NOW)),
]
WHEN = {
    "before the first step": ("data",),
    "in the first step": ("step",),
    "in a later step": ("stepped",),
    "after the last": ("ended",),
}
CODES = {RUN: "nothing", RESIZE: "a resize", PREEMPTED: "a node's end", INTERRUPTED: "a stop"}


def rows() -> list[str]:
    """Returns the rows of the table: for each event, state of the workers, and earlier orders, the driver's action, if any."""
    table = ["| what happens | while the workers are | ordered so far | what the driver does |", "|---|---|---|---|"]
    for words, event in EVENTS:
        late: dict[str, Any] = {"stop_by": NOW - 1} if "grace" in words else {"back_by": NOW} if "not back" in words else {}
        cells: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for when, (phase,) in WHEN.items():
            outcomes: dict[str, list[str]] = {}
            for code, name in CODES.items():
                if late.get("stop_by") and code < PREEMPTED:
                    continue
                if action := decide(watch(phase, ordered=code, **late), event)[1]:
                    outcomes.setdefault((type(action).__doc__ or "").partition(".")[0].lower(), []).append(name)
            for does, names in outcomes.items():
                cells.setdefault((does, tuple(names)), []).append(when)
        for (does, names), whens in cells.items():
            when = "anywhere" if len(whens) == len(WHEN) else ", ".join(whens)
            table.append(f"| {words} | {when} | {'anything' if len(names) == len(CODES) else ', '.join(names)} | {does} |")
    return table


def test_the_documents_table_of_orders_is_the_codes():
    text = Path(__file__).parents[2].joinpath("docs/reliability/driver-states.md").read_text(encoding="utf-8")
    expected = "\n".join(rows())
    assert expected + "\n\n" in text, f"docs/reliability/driver-states.md: the table of orders is\n{expected}"


def test_the_table_has_every_event_of_an_attempt():
    assert {type(event) for _, event in EVENTS} == set(get_args(orders.AttemptEvent))
