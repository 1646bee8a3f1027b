"""Decides how a run continues when an attempt ends: pure decisions, so that `run` only carries them out.

Errors that would recur (a faulty job, damaged data, a non-finite loss) are final. So is a store's refusal that the driver meets
too (`refusals`); another is a failure. A corrupt checkpoint means resuming from the one before it, a loss spike from before the
spike. Both, and all that a machine may be blamed for (a dead worker or node, memory, a store's outage, a stall), count as
failures: a limited number may follow each other without a new checkpoint between them, each after a longer pause. Preemptions,
resizes and waiting for resources are no failures and have no limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from heliostat.config.spec import Retries
from heliostat.errors import (
    AccessError,
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    DataError,
    HeliostatError,
    LeaseError,
    LossSpikeError,
    NonFiniteError,
    PlacementError,
    WorkerError,
)
from heliostat.storage.retries import Backoff

Kind = Literal["final", "refused", "corrupt", "spike", "failure", "queued"]


def classify(error: HeliostatError) -> Kind:
    """Classifies an attempt's error by its consequence for the run."""
    if isinstance(error, CorruptCheckpointError):
        return "corrupt"
    if isinstance(error, LossSpikeError):
        return "spike"
    if isinstance(error, PlacementError):
        return "queued"
    if isinstance(error, AccessError):
        return "refused"
    if isinstance(error, ConfigError | DataError | CheckpointError | LeaseError | NonFiniteError):
        return "final"
    return "failure"


@dataclass
class Budget:
    """Counts consecutive failures; a new checkpoint starts the count anew."""

    retries: Retries
    used: int = 0
    checkpoint: int = -1  # the newest that was there at the last failure
    last: tuple[str, int] = ("", -1)

    def spend(self, error: HeliostatError, checkpoint: int) -> float:
        """Books a failure; returns the seconds to wait before the next attempt, or raises the error once the retries are used up.

        The first in a row waits for nothing.

        `checkpoint`: step of the newest checkpoint. A WorkerError that recurs at the same checkpoint is raised at once.
        """
        self.used = 1 if checkpoint > self.checkpoint else self.used + 1
        same, self.last = self.last == (str(error), checkpoint), (str(error), checkpoint)
        self.checkpoint = max(self.checkpoint, checkpoint)
        if same and isinstance(error, WorkerError):
            raise WorkerError(f"{error}; a second time, so it was not tried again") from error
        if self.used > self.retries.max:
            text = f"{error}; given up after {self.retries.max} retries without a new checkpoint"
            raise type(error)(text, *error.args[1:]) from error
        return Backoff(self.retries.backoff, self.retries.backoff_max).wait(self.used - 1) if self.used > 1 else 0.0


def frozen(heartbeats: dict[int, dict], now: float, limit: float) -> tuple[str, ...]:
    """Finds the node whose workers are silent when a run has stalled, by `limit` seconds; none if several nodes' are."""
    nodes = {p["node"] for p in heartbeats.values() if now - p["at"] > limit / 2}
    return tuple(nodes) if len(nodes) == 1 else ()


def held_up(heartbeats: Mapping[int, Mapping[str, Any]], calls: Mapping[int, str], workers: int) -> tuple[int | None, str]:
    """Finds the worker that the others wait for in a stall, and says why; None if nothing sets one apart.

    `calls`: where the main thread of each worker is that has answered with its stack traces.
    """
    if silent := [rank for rank in range(workers) if rank not in calls]:
        more = f", and {len(silent) - 1} more don't" if len(silent) > 1 else ""
        return silent[0], f"doesn't answer{more}"
    reached = {rank: (p.get("step", 0), p.get("micro", 0)) for rank, p in heartbeats.items()}
    last = max(reached.values(), default=(0, 0))
    if behind := [rank for rank in reached if reached[rank] < last]:
        rank = min(behind, key=lambda r: (reached[r], heartbeats[r]["moved"]))
        return rank, f"is the slowest, {_where(reached[rank])}; the fastest is {_where(last)}"
    alike = Counter(calls.values())
    if len(alike) == 1:
        return (
            None,
            f"all {workers} workers answer and wait in the same call, {min(alike) or 'outside of Python'}, {_where(last)}",
        )
    rank = min(calls, key=lambda r: (alike[calls[r]], heartbeats[r]["moved"] if r in heartbeats else 0.0))
    return rank, f"is in another call than others, {calls[rank] or 'outside of Python'}, {_where(last)}"


def _where(reached: tuple[int, int]) -> str:
    step, micro = reached
    return f"in step {step} after micro-batch {micro}" if step else "before the first step"


def choose(allowed: list[int], room: int) -> int:
    """Chooses the worker count to start with: the largest allowed that fits in `room`; if none fits, the smallest, to wait."""
    return max((n for n in allowed if n <= room), default=min(allowed))


def stalled(heartbeats: dict[int, dict], workers: int, now: float, limit: float, since: float) -> str | None:
    """Explains why the workers count as stalled; None if they do not.

    `heartbeats`: by rank, with `moved`, the time of the last change in `progress`, and `at`, the time of the last heartbeat.
    `limit`: seconds. `since`: when the watch began. Progress of one worker is enough: the others may wait for it. A worker
    without a heartbeat for `limit` is itself stalled.
    """
    moved = max([since, *(p["moved"] for p in heartbeats.values())])
    if now - moved > limit:
        return f"no worker got on for {now - moved:.0f} s"
    silent = [r for r in range(workers) if now - max(since, heartbeats[r]["at"] if r in heartbeats else since) > limit]
    return f"no sign of life from worker {silent[0]} for {limit:.0f} s" if silent else None
