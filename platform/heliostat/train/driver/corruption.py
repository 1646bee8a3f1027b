"""Decides what is done about corruption: which checkpoint is in no doubt, and which nodes take no workers any more."""

from __future__ import annotations

import logging
from typing import Any

from heliostat.checkpoint import layout
from heliostat.checkpoint.layout import Checkpoint
from heliostat.config.spec import Job
from heliostat.errors import CorruptCheckpointError, CorruptionError, HeliostatError
from heliostat.storage import Location

log = logging.getLogger(__name__)


def trusted(run: Location, error: HeliostatError) -> Checkpoint | None:
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


def leave_out(bad: list[str], job: Job, count: int, pool: Any) -> None:
    """Gives these nodes no workers any more, if others have room for `count` of them."""
    from heliostat.cluster import nodes

    avoid, names = pool.avoided() | set(bad), ", ".join(bad)
    held = {node: workers for node, workers in pool.held().items() if node not in avoid}
    if nodes.room_now(job, held, avoid) >= count:
        pool.avoid(bad, for_good=True)
        log.warning("train.recheck: left out from here on: node %s", names)
    else:
        log.warning("train.recheck: no other nodes have room for %d workers, so these stay in use; look at node %s", count, names)
