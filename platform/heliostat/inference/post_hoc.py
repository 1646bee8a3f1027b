"""Computes, after training, the average of the weights with any length, from the snapshots that a run with `train.ema.lengths`
keeps (`optim.power_averages`)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from heliostat.checkpoint import snapshots
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.checkpoint.snapshots import Summand, SummedAverage
from heliostat.errors import CheckpointError, ConfigError
from heliostat.optim import power_averages
from heliostat.optim.power_averages import LONGEST, SHORTEST, PowerProfile
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)

GUIDE = "docs/post-hoc-ema.md"
TOLERATED = 0.05  # relative error of a profile above which an export warns


@dataclass(frozen=True)
class PostHocAverage(SummedAverage):
    """Provides the weights of an average. `error`: the difference of its profile from the wanted profile, relative to the wanted
    profile."""

    length: float
    error: float

    @property
    def steps(self) -> list[int]:
        """Lists the steps of the snapshots that the average uses, in ascending order."""
        return sorted({one.saved.step for one in self.summands})


def average(run: Location, checkpoint: SavedCheckpoint, length: float) -> PostHocAverage:
    """Finds the sum of snapshots that is nearest to the average with `length` at a checkpoint's step.

    Raises ConfigError if the run keeps no averages with lengths, or if no average has this length.
    """
    if not SHORTEST <= length <= LONGEST:
        raise ConfigError(f"--ema-length: {length:g} isn't between {SHORTEST:g} and {LONGEST:g}. Use a length in this range")
    settings = checkpoint.job.train.ema
    kinds = settings.by_length if settings else {}
    if not kinds:
        raise ConfigError(
            f"--ema-length: {run} keeps no averages with lengths. Train with train.ema.lengths, or omit this option ({GUIDE})"
        )
    saved = {one.step: one for one in snapshots.up_to(run, checkpoint.step)} | {checkpoint.step: checkpoint}
    pairs = [(one, kind) for one in saved.values() for kind in one.averages if kind in kinds]
    known = [PowerProfile(kinds[kind], _made(one)) for one, kind in pairs]
    factors, error = power_averages.combination(known, PowerProfile(length, _made(checkpoint)))
    summands = [Summand(one, kind, float(factor)) for (one, kind), factor in zip(pairs, factors, strict=True)]
    combined = PostHocAverage(summands, length, error)
    if error > TOLERATED:
        log.warning(
            "--ema-length: %d snapshots reproduce the profile of length %g with an error of %.1f %%. Use a length nearer to %s, "
            "or train with a smaller train.ema.every",
            len(combined.steps), length, 100 * error, " or ".join(f"{own:g}" for own in kinds.values()),
        )  # fmt: skip
    return combined


def _made(saved: SavedCheckpoint) -> int:
    """Returns the number of steps that the optimizer had made. Raises CheckpointError if the index lacks this number."""
    steps = saved.index.resume.get("optimizer_steps")
    if not isinstance(steps, int) or steps < 1:
        raise CheckpointError(f"{saved.location}: the index has no number of optimizer steps ({steps!r}). Delete this folder")
    return steps
