"""Decides how a run continues when an attempt ends. The decisions are pure functions; `run` carries them out.

- Final: errors that would recur, such as a faulty job, damaged data, or a non-finite loss. A store that rejects both workers and
  driver is final, too (`suspects`). If the store rejects only workers, this is a failure.
- Corrupt checkpoint: the run resumes from the previous checkpoint.
- Loss spike: the run resumes from before the spike.
- Failure: any other error that a machine may have caused: a dead worker or node, a lack of memory, a store's outage, or a stall.

Corrupt checkpoints, loss spikes, and failures use retries. The number of retries without a new checkpoint is limited, and each
retry waits longer than the previous one. Preemptions, resizes, and waiting for resources aren't failures, and have no limit.
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
    """Counts consecutive failures. A new checkpoint resets the count."""

    retries: Retries
    used: int = 0
    checkpoint: int = -1  # step of the newest checkpoint at the last failure
    last: tuple[str, int] = ("", -1)

    def spend(self, error: HeliostatError, checkpoint: int) -> float:
        """Counts a failure. Returns the seconds to wait before the next attempt; the first failure in a row waits 0 s.

        `checkpoint`: the step of the newest checkpoint. Raises the error if the retries are used up, or if a WorkerError recurs
        at the same checkpoint.
        """
        self.used = 1 if checkpoint > self.checkpoint else self.used + 1
        same, self.last = self.last == (str(error), checkpoint), (str(error), checkpoint)
        self.checkpoint = max(self.checkpoint, checkpoint)
        if same and isinstance(error, WorkerError):
            raise WorkerError(f"{error}. This error occurred twice at the same checkpoint, so heliostat doesn't retry") from error
        if self.used > self.retries.max:
            text = f"{error}. Giving up after {self.retries.max} retries without a new checkpoint"
            raise type(error)(text, *error.args[1:]) from error
        return Backoff(self.retries.backoff, self.retries.backoff_max).wait(self.used - 1) if self.used > 1 else 0.0


def choose(allowed: list[int], room: int) -> int:
    """Chooses the worker count to start with: the largest of `allowed` that fits in `room`.

    If none of them fits, returns the smallest of `allowed`, and the run waits for its resources.
    """
    return max((n for n in allowed if n <= room), default=min(allowed))
