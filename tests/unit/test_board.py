"""Tests the monitoring of many workers: every live worker is heard, for any clock and any number of workers."""

import os
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.config import spec
from heliostat.errors import HeliostatError, StalledError
from heliostat.runs.events import Event, NodeSample, Notice, Stack, WorkerFailed
from heliostat.training import mailbox
from heliostat.training.driver import attempt, watchdog
from heliostat.training.driver.orders import WorkerWatch
from heliostat.training.driver.pool import Member
from heliostat.training.driver.signals import Signals
from heliostat.training.worker.build import Worker
from heliostat.training.worker.heartbeat import Heartbeat

from tests.unit.test_abort import loop_in_step

FACTS: mailbox.Facts = {"pid": 1, "node": "n", "step": 0, "micro": 0}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("workers", [2, 128, 1024, 4096])
def test_every_worker_that_lives_is_asked_for_its_stacks_before_it_counts_as_frozen(workers):
    """Each worker receives the order with its next pulse. More workers mean rarer pulses."""
    clock, draw = Clock(), random.Random(workers)
    state = mailbox.MailboxState(clock=clock)
    frozen = set(draw.sample(range(workers), max(1, workers // 100)))
    due = {r: clock.now + draw.uniform(0, mailbox.interval(workers)) for r in range(workers) if r not in frozen}
    answers = list[tuple[float, int]]()

    def sleep(seconds: float) -> None:
        """Simulates the workers during that time."""
        clock.sleep(seconds)
        for rank, at in due.items():
            if at <= clock.now:
                due[rank] = at + mailbox.interval(workers)
                if state.heartbeat(0, rank, 7, FACTS).get("dump"):
                    answers.append((clock.now + draw.uniform(0, watchdog.ANSWER_S - 2 * watchdog.POLL_S), rank))
                    due[rank] = float("inf")
        for one in [a for a in answers if a[0] <= clock.now]:
            answers.remove(one)
            state.post(0, Stack(rank=one[1], stack="in all_reduce"))

    state.order(0, {"dump": True})
    state.post(0, Notice(text="others"))
    others = list[Event]()
    found = watchdog.collect(workers, lambda: [event for _, event in state.drain().events], others.append, clock, sleep)
    assert set(found) == set(range(workers)) - frozen and [type(e) for e in others] == [Notice]
    told = watchdog.text(found, workers)
    assert told.splitlines()[0].endswith("so they are frozen or dead: " + ", ".join(str(r) for r in sorted(frozen)))


def test_pulses_stay_as_many_as_the_board_can_answer():
    for workers in (1, 100, 1024, 10_000):
        assert workers / mailbox.interval(workers) <= 100


def watched(limit: float = 60.0) -> attempt.Attempt:
    """Returns an attempt, without Ray, whose worker has just made progress."""
    made = attempt.Attempt.__new__(attempt.Attempt)
    made.job = SimpleNamespace(workers=spec.Workers(count=1), watchdog=spec.Watchdog(start=limit, stall=limit))  # type: ignore[assignment]
    made.start = SimpleNamespace(job=made.job)  # type: ignore[assignment]
    made.pool = SimpleNamespace(waiting=False)  # type: ignore[assignment]
    made.signals, made._deciding = Signals(), threading.Lock()
    made._watch = WorkerWatch(grace=60.0, settle=10.0, hear=1.0, phase="step")
    made._since = time.monotonic() - 1000
    made._heartbeats = {0: {**FACTS, "progress": 1, "moved": time.monotonic(), "at": time.monotonic()}}
    made._members, made._keep_stacks = [], lambda: ("stacks", {})  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_wall_clock_that_is_set_stalls_nobody_and_hides_no_stall(monkeypatch, jump):
    """A clock change of an hour, by summer time or a first answer of a time server, isn't an hour without progress."""
    made, state, now = watched(), mailbox.MailboxState(), time.time()
    state.heartbeat(0, 0, 1, FACTS)
    monkeypatch.setattr(time, "time", lambda: now + jump)
    made._look()
    assert made._watch.fault is None
    assert 0 <= state.drain()[1][0]["moved"] < 60
    made._heartbeats[0]["moved"] = time.monotonic() - 61
    made._look()
    assert "no worker made progress for 61 s" in str(made._watch.fault)


def test_what_many_nodes_are_busy_with_crowds_no_loss_out_and_what_is_lost_is_counted(monkeypatch):
    monkeypatch.setattr(mailbox, "LIMIT", 10)
    monkeypatch.setattr(mailbox, "SYSTEM_LIMIT", 5)
    state = mailbox.MailboxState()
    for step in range(12):
        state.post(0, Notice(text=str(step)))
        for node in range(64):
            state.post(0, NodeSample(node=str(node), values={}))
    events, _, lost, _ = state.drain()
    assert [e.text for _, e in events if isinstance(e, Notice)] == [str(step) for step in range(2, 12)]
    assert len(events) == 15 and lost == 2 + 12 * 64 - 5
    assert state.drain() == ([], {}, 0, 0)


def test_a_message_of_an_earlier_attempt_reaches_the_driver_as_one_and_changes_nothing_else():
    """The driver drops events. The mailbox drops and counts heartbeats, orders, and decisions."""
    state = mailbox.MailboxState(1)
    state.heartbeat(1, 0, 5, FACTS)
    state.order(1, {"stop": 2})
    state.decide(1, 10, 0)
    state.post(1, Notice(text="before the end of attempt 1"))
    state.begin(2)
    state.post(1, Notice(text="after it"))
    assert state.heartbeat(1, 0, 6, FACTS) == {"abort": True}, "a worker that still lives ends"
    state.order(1, {"dump": True})
    state.decide(1, 20, 3)
    assert state.decision(1, 10) is None and state.decision(2, 10) is None and state.decision(2, 20) is None
    assert state.heartbeat(2, 1, 1, FACTS) == {}
    events, heartbeats, lost, stale = state.drain()
    assert [number for number, _ in events] == [1, 1] and list(heartbeats) == [1] and (lost, stale) == (0, 4)
    assert state.drain().stale == 0


def test_an_attempt_hands_on_events_of_earlier_ones_with_their_number_and_takes_no_error_of_theirs(monkeypatch):
    state, handed = mailbox.MailboxState(2), list[tuple[int, str]]()
    state.post(1, WorkerFailed(rank=0, error=HeliostatError("late")))
    state.post(1, Notice(text="late"))
    state.post(2, WorkerFailed(rank=1, error=HeliostatError("the cause")))
    state.post(2, Notice(text="now"))
    made = watched()
    made._mailbox = SimpleNamespace(attempt=2, drain=state.drain)  # type: ignore[assignment]
    made._hand_over = lambda number, event: handed.append((number, type(event).__name__))  # type: ignore[method-assign]
    made._draining, made._reported = None, {}
    monkeypatch.setattr(attempt.ray, "get", lambda answer, timeout: answer)
    assert [event.text for event in made._drained() if isinstance(event, Notice)] == ["now"]
    assert handed == [(1, "WorkerFailed"), (1, "Notice")] and {r: str(e) for r, e in made._reported.items()} == {1: "the cause"}


def test_what_the_mailbox_answers_too_late_for_one_look_comes_with_the_next(monkeypatch):
    """The events of such an answer were lost without a message."""
    state = mailbox.MailboxState(1)
    state.post(1, Notice(text="kept"))
    made = watched()
    made._mailbox = SimpleNamespace(attempt=1, drain=state.drain)  # type: ignore[assignment]
    made._draining, made._reported = None, {}
    answers = iter([attempt.ray.exceptions.GetTimeoutError(), None])

    def get(answer: Any, timeout: float) -> Any:
        if error := next(answers):
            raise error
        return answer

    monkeypatch.setattr(attempt.ray, "get", get)
    assert made._drained() == [] and [type(event) for event in made._drained()] == [Notice]


def stack(*frames: str) -> str:
    """Returns stack traces of a process whose main thread is in these calls."""
    main = "".join(f'  File "/lib/{frame.split()[0]}", line 7, in {frame.split()[1]}\n    x()\n' for frame in frames)
    return f'thread heartbeat:\n  File "/lib/threading.py", line 1, in wait\n    y()\n\nthread MainThread:\n{main}'


def stall(
    stacks: dict[int, str], *reached: tuple[int, int], workers: int = 4, gpus: tuple[str, ...] = ("GPU-1",)
) -> HeliostatError:
    """Returns the error of an attempt whose workers have stalled at these steps and micro-batches."""
    made, now = watched(), time.monotonic()
    made.job.workers = spec.Workers(count=workers)  # type: ignore[misc]
    made._members = [Member(rank, None, rank, f"node{rank}", f"10.0.0.{rank}", gpus) for rank in range(workers)]
    made._heartbeats = {
        rank: {"node": f"node{rank}", "pid": 1, "step": step, "micro": micro, "progress": 1, "moved": now - 70, "at": now}
        for rank, (step, micro) in enumerate(reached)
    }
    made._keep_stacks = lambda: ("stacks.txt", stacks)  # type: ignore[method-assign]
    made._look()
    assert isinstance(made._watch.fault, StalledError)
    return made._watch.fault


def test_a_stall_names_the_slowest_worker_with_its_node_device_step_and_micro_batch():
    """All workers answered, so the error named none of them."""
    reduced = dict.fromkeys(range(4), stack("loop.py step", "c10d.py all_reduce"))
    found = stall(reduced, (12, 4), (12, 4), (12, 1), (12, 3))
    assert str(found) == (
        "no worker made progress for 70 s (watchdog: 60 s): worker 2 on 10.0.0.2 (node node2, GPU GPU-1) is the slowest, "
        "in step 12 after micro-batch 1; the fastest is in step 12 after micro-batch 4. Read the workers' stacks in stacks.txt"
    )


def test_a_stall_in_which_all_workers_wait_in_one_call_says_so():
    reduced = dict.fromkeys(range(4), stack("loop.py step", "c10d.py all_reduce"))
    same = "all 4 workers answer and wait in the same call, all_reduce (c10d.py:7), in step 12 after micro-batch 4. "
    assert same in str(stall(reduced, *[(12, 4)] * 4))
    assert "same call, all_reduce (c10d.py:7), before the first step" in str(stall(reduced, *[(0, 0)] * 4))


def test_a_stall_names_the_worker_that_is_in_another_call_or_that_does_not_answer():
    stacks = dict.fromkeys(range(4), stack("loop.py step", "c10d.py all_reduce")) | {3: stack("loop.py step", "recipe.py read")}
    place, where = "worker 3 on 10.0.0.3 (node node3, GPU GPU-1)", "read (recipe.py:7), in step 12 after micro-batch 4"
    assert f"{place} is in a different call from the others, {where}. " in str(stall(stacks, *[(12, 4)] * 4))
    del stacks[1]
    assert "worker 1 on 10.0.0.1 (node node1) doesn't answer. Read the" in str(stall(stacks, *[(12, 4)] * 4, gpus=()))


def test_a_worker_tells_which_step_and_micro_batch_it_is_at(monkeypatch):
    beat, sent = object.__new__(Heartbeat), list[Any]()
    beat._rank, beat.progress, beat._ordered, beat._node, beat._every = 0, 9, 0, "n", 0.0
    beat._ended = SimpleNamespace(wait=lambda seconds: True)  # type: ignore[assignment]
    beat._mailbox = SimpleNamespace(heartbeat=lambda *given: sent.append(given) or {})
    monkeypatch.setattr("ray.get", lambda answer, timeout: answer)
    worker: Any = Worker.__new__(Worker)
    loop = loop_in_step(lambda: [worker._handed() for _ in range(3)] and None)
    loop.unsealed = loop.reports.trained = SimpleNamespace(add=lambda *given: None)
    loop.context.progressed = worker._progressed
    loop.heartbeat = worker.heartbeat = beat
    monkeypatch.setattr(Heartbeat, "stop", 0)
    loop._make(5)
    beat._beat()
    assert sent == [(0, 13, {"pid": os.getpid(), "node": "n", "step": 6, "micro": 3})]
