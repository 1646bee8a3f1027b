"""Decides how a run continues when an attempt ends: pure decisions, which `run` carries out.

Errors that would recur (a faulty job, damaged data, a non-finite loss) are final. So is a store's refusal that the driver meets
too (`suspects`); another is a failure. A corrupt checkpoint means resuming from the one before it, a loss spike from before the
spike. Both, and all that a machine may be blamed for (a dead worker or node, memory, a store's outage, a stall), count as
failures: a limited number may follow each other without a new checkpoint between them, each after a longer pause. Preemptions,
resizes and waiting for resources are no failures and have no limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """Counts consecutive failures; a new checkpoint starts the count again."""

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
            raise WorkerError(f"{error}. It happened twice at the same checkpoint, so heliostat doesn't retry") from error
        if self.used > self.retries.max:
            text = f"{error}. Giving up after {self.retries.max} retries without a new checkpoint"
            raise type(error)(text, *error.args[1:]) from error
        return Backoff(self.retries.backoff, self.retries.backoff_max).wait(self.used - 1) if self.used > 1 else 0.0


def choose(allowed: list[int], room: int) -> int:
    """Chooses the worker count to start with: the largest allowed that fits in `room`; if none fits, the smallest, to wait."""
    return max((n for n in allowed if n <= room), default=min(allowed))
