"""Describes where a worker stands in an attempt: what all its parts need to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from heliostat.config.spec import Job
from heliostat.data.dataset import DataPlan
from heliostat.storage.lease import Fence
from heliostat.storage.locations import Location
from heliostat.training.worker.posts import Posts


@dataclass(frozen=True)
class Context:
    """Holds the attempt's job, data and first step, and this worker's place in it.

    `control`: a gloo group of all workers; `fence`: of the driver's lease; `progressed`: reports progress to the watchdog,
    and raises PeerLostError once the workers were ordered to abort.
    """

    job: Job
    plan: DataPlan
    run_folder: Location
    start_step: int
    rank: int
    world: int
    control: Any
    fence: Fence
    posts: Posts
    progressed: Callable[[], None]
