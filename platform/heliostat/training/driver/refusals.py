"""Decides what a store's refusal of one request means for a run: the end if the driver is refused too, else a node's failure.

Credentials that have expired on one node, a clock that is wrong there, and a file system that is not mounted there concern only
that node's requests.
"""

from __future__ import annotations

import logging
from typing import Any

from heliostat.config.spec import Job
from heliostat.errors import AccessError, HeliostatError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)


def confirmed(error: AccessError, job: Job) -> bool:
    """Checks whether this process is refused too, in the run's folder, at a source, or at the place of the error."""
    try:
        job.run_folder.join(run_folder.PROBE).write(b"")
        for place in [*job.sources, *([Location(error.place)] if error.place else [])]:
            place.exists()
    except AccessError as e:
        log.warning("the driver is refused too: %s", e)
        return True
    except (HeliostatError, OSError) as e:
        log.warning("whether the driver is refused too is not known: %s", e)
    return False


def leave_out(bad: str, job: Job, count: int, pool: Any) -> None:
    """Avoids the node that was refused for some time, if others have room for `count` workers."""
    from heliostat.cluster import nodes

    avoid = pool.avoided() | {bad}
    held = {node: workers for node, workers in pool.held().items() if node not in avoid}
    if bad and nodes.room_now(job, held, avoid) >= count:
        pool.avoid([bad])
        log.warning("the store refuses requests of node %s, which is avoided for some time", bad)
