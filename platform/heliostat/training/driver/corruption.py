"""Decides which checkpoint a run resumes from after corruption, of its data or of a machine's computing."""

from __future__ import annotations

import logging

from heliostat.checkpoint import layout
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.errors import CorruptCheckpointError, CorruptionError, HeliostatError
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)


def trusted(run: Location, error: HeliostatError) -> SavedCheckpoint | None:
    """Finds the newest checkpoint that the error leaves in no doubt; if it leaves none, the newest of all."""
    if isinstance(error, CorruptCheckpointError):
        return layout.latest(run, error.step)
    if not isinstance(error, CorruptionError):
        return layout.latest(run)
    if found := layout.latest(run, error.agreed + 1):
        return found
    if found := layout.latest(run):
        log.warning(
            "no checkpoint of up to step %d is kept, so the run goes on from one in doubt; raise checkpoint.keep, or "
            "lower train.recheck.every", error.agreed,
        )  # fmt: skip
    return found
