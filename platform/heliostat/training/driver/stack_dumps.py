"""Collects the stack traces of all workers' threads when no worker makes progress any more."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from heliostat.runs.events import Event, Stack
from heliostat.training.mailbox import interval

ANSWER_S = 5.0  # for a worker that has heard of it, to look and to answer
POLL_S = 0.5
FRAME = re.compile(r'  File "(?:.*/)?([^"/]+)", line (\d+), in (\S+)')


def wait_s(workers: int) -> float:
    """Computes the seconds to wait for all stack traces.

    A worker gets the order with its next heartbeat, and the more workers there are, the rarer those are.
    """
    return interval(workers) + ANSWER_S


def collect(
    workers: int,
    drain: Callable[[], list[Event]],
    take: Callable[[Event], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[int, str]:
    """Collects the workers' stack traces, by rank, that arrive within `wait_s` after the order.

    `take` gets all other events that `drain` returns meanwhile.
    """
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


def call(stack: str) -> str:
    """Finds where the main thread is in a worker's stack traces; empty if that is not in them."""
    main = next((part for part in re.split(r"^thread ", stack, flags=re.M) if part.startswith("MainThread:")), "")
    frames = FRAME.findall(main)
    return "{2} ({0}:{1})".format(*frames[-1]) if frames else ""


def text(stacks: dict[int, str], workers: int) -> str:
    """Formats the stack traces by worker, headed by the numbers of the workers that did not answer."""
    silent = [str(r) for r in range(workers) if r not in stacks]
    head = [f"no answer in {wait_s(workers):.0f} s, so frozen, or dead: worker {', '.join(silent)}"] if silent else []
    return "\n\n".join([*head, *(f"worker {r}: {stacks[r]}" for r in sorted(stacks))])
