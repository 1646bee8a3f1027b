"""Watches the workers of an attempt: detects a stall, then collects all stack traces, and finds the worker that delays the
others.

`heartbeats`: each worker's last heartbeat, by rank, from the mailbox. Times are of this process's clock: `at` is when the
heartbeat arrived, `moved` is when its `progress` last changed.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping

from heliostat.runs.events import Event, Stack
from heliostat.training.mailbox import Pulse, interval

ANSWER_S = 5.0  # seconds for a worker to read its stacks and answer, once it has the order
POLL_S = 0.5
FRAME = re.compile(r'  File "(?:.*/)?([^"/]+)", line (\d+), in (\S+)')


def wait_s(workers: int) -> float:
    """Computes the seconds to wait for all stack traces.

    A worker gets the order with its next heartbeat. With more workers, the time between two heartbeats of a worker is longer.
    """
    return interval(workers) + ANSWER_S


def collect(
    workers: int,
    drain: Callable[[], list[Event]],
    take: Callable[[Event], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[int, str]:
    """Collects the stack traces that arrive within `wait_s` seconds after the order. Returns the traces by rank.

    `drain` returns new events. `take` is called with the events that aren't stack traces.
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
    """Finds the innermost call of the main thread in a worker's stack traces.

    Returns an empty string if the traces lack the main thread.
    """
    main = next((part for part in re.split(r"^thread ", stack, flags=re.M) if part.startswith("MainThread:")), "")
    frames = FRAME.findall(main)
    return "{2} ({0}:{1})".format(*frames[-1]) if frames else ""


def text(stacks: dict[int, str], workers: int) -> str:
    """Formats the stack traces by worker. The first line lists the workers that didn't answer."""
    silent = [str(r) for r in range(workers) if r not in stacks]
    head = (
        [f"no answer within {wait_s(workers):.0f} s from these workers, so they are frozen or dead: {', '.join(silent)}"]
        if silent
        else []
    )
    return "\n\n".join([*head, *(f"worker {r}: {stacks[r]}" for r in sorted(stacks))])


def stalled(heartbeats: Mapping[int, Pulse], workers: int, now: float, limit: float, since: float) -> str | None:
    """Explains why the workers count as stalled. Returns None if the workers aren't stalled.

    `limit`: seconds. `since`: when the watch began. If one worker makes progress, none counts as stalled, because the other
    workers may be waiting for this worker. Exception: a worker that sends no heartbeat for `limit` seconds always counts as
    stalled.
    """
    moved = max([since, *(p["moved"] for p in heartbeats.values())])
    if now - moved > limit:
        return f"no worker made progress for {now - moved:.0f} s"
    silent = [r for r in range(workers) if now - max(since, heartbeats[r]["at"] if r in heartbeats else since) > limit]
    return f"no heartbeat from worker {silent[0]} for {limit:.0f} s" if silent else None


def frozen(heartbeats: Mapping[int, Pulse], now: float, limit: float) -> tuple[str, ...]:
    """Finds the node whose workers are silent in a stalled run. Returns nothing if workers of several nodes are silent.

    A worker is silent if it has sent no heartbeat for half of `limit` seconds.
    """
    nodes = {p["node"] for p in heartbeats.values() if now - p["at"] > limit / 2}
    return tuple(nodes) if len(nodes) == 1 else ()


def held_up(heartbeats: Mapping[int, Pulse], calls: Mapping[int, str], workers: int) -> tuple[int | None, str]:
    """Finds the worker that the others wait for in a stall, and explains why. The rank is None if no worker differs from the
    others.

    `calls`: by rank, the innermost call of each main thread; only of workers that answered with their stack traces.
    """
    if silent := [rank for rank in range(workers) if rank not in calls]:
        more = f", and {len(silent) - 1} more workers don't answer" if len(silent) > 1 else ""
        return silent[0], f"doesn't answer{more}"
    reached = {rank: (p["step"], p["micro"]) for rank, p in heartbeats.items()}
    last = max(reached.values(), default=(0, 0))
    if behind := [rank for rank in reached if reached[rank] < last]:
        rank = min(behind, key=lambda r: (reached[r], heartbeats[r]["moved"]))
        return rank, f"is the slowest, {_where(reached[rank])}; the fastest is {_where(last)}"
    per_call = Counter(calls.values())
    if len(per_call) == 1:
        return (
            None,
            f"all {workers} workers answer and wait in the same call, {min(per_call) or 'outside of Python'}, {_where(last)}",
        )
    rank = min(calls, key=lambda r: (per_call[calls[r]], heartbeats[r]["moved"] if r in heartbeats else 0.0))
    return rank, f"is in a different call from the others, {calls[rank] or 'outside of Python'}, {_where(last)}"


def _where(reached: tuple[int, int]) -> str:
    step, micro = reached
    return f"in step {step} after micro-batch {micro}" if step else "before the first step"
