"""Asking all workers what their threads are at, when none of them gets on any more."""

from __future__ import annotations

import time
from collections.abc import Callable

from heliostat.events import Event, Stack
from heliostat.train.mailbox import interval

ANSWER_S = 5.0  # for a worker that has heard of it, to look and to answer
POLL_S = 0.5


def wait_s(workers: int) -> float:
    """A worker hears of the order with its next heartbeat, and the more there are, the rarer those are."""
    return interval(workers) + ANSWER_S


def collect(
    workers: int,
    drain: Callable[[], list[Event]],
    take: Callable[[Event], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[int, str]:
    """The stacks that come within `wait_s`, by rank, once the order is given. `take` gets what else `drain` brings meanwhile."""
    stacks: dict[int, str] = {}
    deadline = clock() + wait_s(workers)
    while len(stacks) < workers and clock() < deadline:
        sleep(POLL_S)
        for event in drain():
            if isinstance(event, Stack):
                stacks[event.rank] = event.stack
            else:
                take(event)
    return stacks


def text(stacks: dict[int, str], workers: int) -> str:
    """Those who answered, and by number those who did not."""
    silent = [str(r) for r in range(workers) if r not in stacks]
    head = [f"no answer in {wait_s(workers):.0f} s, so frozen, or dead: worker {', '.join(silent)}"] if silent else []
    return "\n\n".join([*head, *(f"worker {r}: {stacks[r]}" for r in sorted(stacks))])
