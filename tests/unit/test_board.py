"""The watch over many workers: whoever lives is heard of, whatever the clocks say and however many there are."""

import random
import time
from types import SimpleNamespace

import pytest
from heliostat.config import spec
from heliostat.runs.events import Event, NodeSample, Notice, Stack
from heliostat.training import mailbox
from heliostat.training.driver import attempt, stack_dumps
from heliostat.training.driver.signals import Signals


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("workers", [2, 128, 1024, 4096])
def test_every_worker_that_lives_is_asked_for_its_stacks_before_it_counts_as_frozen(workers):
    """Each hears of the order with its next pulse, which comes the more rarely the more workers there are."""
    clock, draw = Clock(), random.Random(workers)
    state = mailbox.State(clock)
    frozen = set(draw.sample(range(workers), max(1, workers // 100)))
    due = {r: clock.now + draw.uniform(0, mailbox.interval(workers)) for r in range(workers) if r not in frozen}
    answers = list[tuple[float, int]]()

    def sleep(seconds: float) -> None:
        """The workers' side of that time."""
        clock.sleep(seconds)
        for rank, at in due.items():
            if at <= clock.now:
                due[rank] = at + mailbox.interval(workers)
                if state.heartbeat(rank, 7, {"pid": 1, "node": "n"}).get("dump"):
                    answers.append((clock.now + draw.uniform(0, stack_dumps.ANSWER_S - 2 * stack_dumps.POLL_S), rank))
                    due[rank] = float("inf")
        for one in [a for a in answers if a[0] <= clock.now]:
            answers.remove(one)
            state.post(Stack(rank=one[1], stack="in all_reduce"))

    state.order(dump=True)
    state.post(Notice(text="others"))
    others = list[Event]()
    found = stack_dumps.collect(workers, lambda: state.drain()[0], others.append, clock, sleep)
    assert set(found) == set(range(workers)) - frozen and [type(e) for e in others] == [Notice]
    told = stack_dumps.text(found, workers)
    assert told.splitlines()[0].endswith("frozen, or dead: worker " + ", ".join(str(r) for r in sorted(frozen)))


def test_pulses_stay_as_many_as_the_board_can_answer():
    for workers in (1, 100, 1024, 10_000):
        assert workers / mailbox.interval(workers) <= 100


def watched(limit: float = 60.0) -> attempt.Attempt:
    """An attempt whose worker has just got on; without Ray."""
    made = attempt.Attempt.__new__(attempt.Attempt)
    made.job = SimpleNamespace(workers=spec.Workers(count=1), watchdog=spec.Watchdog(start=limit, stall=limit))  # type: ignore[assignment]
    made.start = SimpleNamespace(job=made.job)  # type: ignore[assignment]
    made.pool = SimpleNamespace(waiting=False)  # type: ignore[assignment]
    made.signals, made._ordered, made._phase, made._fault, made._stop_by = Signals(), 0, "step", None, None
    made._since = time.monotonic() - 1000
    made._heartbeats = {0: {"node": "n", "pid": 1, "moved": time.monotonic(), "at": time.monotonic()}}
    made._keep_stacks = lambda: "stacks"  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_wall_clock_that_is_set_stalls_nobody_and_hides_no_stall(monkeypatch, jump):
    """An hour of summer time, or a first answer of a time server, is no hour in which nobody got on."""
    made, state, now = watched(), mailbox.State(), time.time()
    state.heartbeat(0, 1, {})
    monkeypatch.setattr(time, "time", lambda: now + jump)
    made._look()
    assert made._fault is None
    assert 0 <= state.drain()[1][0]["moved"] < 60
    made._heartbeats[0]["moved"] = time.monotonic() - 61
    made._look()
    assert "no worker got on for 61 s" in str(made._fault)


def test_what_many_nodes_are_busy_with_crowds_no_loss_out_and_what_is_lost_is_counted(monkeypatch):
    monkeypatch.setattr(mailbox, "LIMIT", 10)
    monkeypatch.setattr(mailbox, "SYSTEM_LIMIT", 5)
    state = mailbox.State()
    for step in range(12):
        state.post(Notice(text=str(step)))
        for node in range(64):
            state.post(NodeSample(node=str(node), values={}))
    events, _, lost = state.drain()
    assert [e.text for e in events if isinstance(e, Notice)] == [str(step) for step in range(2, 12)]
    assert len(events) == 15 and lost == 2 + 12 * 64 - 5
    assert state.drain() == ([], {}, 0)
