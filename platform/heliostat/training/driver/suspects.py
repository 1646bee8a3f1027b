"""Decides which nodes and checkpoints may be bad after a failure.

After two faults of its devices, or two unexplained failures with no new checkpoint between them, a node is excluded until the
command ends. A node is avoided for some time if a store rejects the node's requests but not the driver's. The node's credentials
may have expired, its clock may be wrong, or a file system may not be mounted on the node. A node is excluded or avoided only if
other nodes have room for the run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heliostat.checkpoint import layout
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.config.spec import Job
from heliostat.errors import AccessError, CorruptCheckpointError, CorruptionError, DeviceError, HeliostatError, TrainingError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location

if TYPE_CHECKING:  # importing Ray takes a second
    from heliostat.training.driver.pool import WorkerPool

log = logging.getLogger(__name__)

FAILURES = 2  # failures of a node after which it is excluded


class Suspicions:
    """Counts failures by the node that may have caused them."""

    def __init__(self) -> None:
        self._devices: Counter[str] = Counter()  # device faults during the command
        self._unexplained: Counter[str] = Counter()  # other failures since the newest checkpoint
        self._checkpoint = -1

    def note(self, error: HeliostatError, checkpoint: int) -> list[str]:
        """Counts an attempt's failure. Returns the nodes to exclude. `checkpoint`: the step of the newest checkpoint."""
        if isinstance(error, CorruptionError):
            return error.nodes
        if not isinstance(error, TrainingError):
            return []
        if checkpoint > self._checkpoint:
            self._checkpoint, self._unexplained = checkpoint, Counter()
        counts = self._devices if isinstance(error, DeviceError) else self._unexplained
        counts.update(error.suspects)
        return [node for node in error.suspects if self._devices[node] + self._unexplained[node] >= FAILURES]


def exclude(bad: Sequence[str], job: Job, count: int, pool: WorkerPool) -> str:
    """Excludes these nodes from the pool if other nodes have room for `count` workers. Returns and logs a sentence about the
    action."""
    names = ", ".join(bad)
    if _room_without(bad, job, pool) >= count:
        pool.avoid(bad, for_good=True)
        text = f"Excluded until this command ends: node {names}. Check the devices of each listed node"
    else:
        text = (
            f"No other nodes have room for {count} workers, so heliostat continues to use node {names}. "
            "Check the devices of each listed node"
        )
    log.warning(text)
    return text


def avoid_refused(bad: str, job: Job, count: int, pool: WorkerPool) -> None:
    """Avoids, for some time, a node whose requests a store has rejected, if other nodes have room for `count` workers."""
    if bad and _room_without([bad], job, pool) >= count:
        pool.avoid([bad])
        log.warning("the store rejects requests from node %s, so heliostat avoids that node for some time", bad)


def _room_without(out: Sequence[str], job: Job, pool: WorkerPool) -> int:
    """Computes the number of workers that fit on the other nodes."""
    from heliostat.cluster import nodes

    avoid = pool.avoided() | set(out)
    return nodes.room_now(job, {node: workers for node, workers in pool.held().items() if node not in avoid}, avoid)


def refuses_driver(error: AccessError, job: Job) -> bool:
    """Checks whether the store rejects requests of this process, and not only of the workers.

    Tries the run's folder, the data sources, and the place of the error.
    """
    try:
        job.run_folder.join(run_folder.PROBE).write(b"")
        for place in [*job.sources, *([Location(error.place)] if error.place else [])]:
            place.exists()
    except AccessError as e:
        log.warning("the store rejects the driver too: %s", e)
        return True
    except (HeliostatError, OSError) as e:
        log.warning("can't check whether the store also rejects the driver's requests: %s", e)
    return False


def trusted(run: Location, error: HeliostatError) -> SavedCheckpoint | None:
    """Finds the newest checkpoint that is safe to use after the error.

    If a CorruptionError means that no checkpoint is safe, returns the newest checkpoint, and logs a warning.
    """
    if isinstance(error, CorruptCheckpointError):
        return layout.latest(run, error.step)
    if not isinstance(error, CorruptionError):
        return layout.latest(run)
    if checkpoint := layout.latest(run, error.agreed + 1):
        return checkpoint
    if checkpoint := layout.latest(run):
        log.warning(
            ("no checkpoint up to step %d is left, so the run resumes from a newer checkpoint that may be corrupt. Raise "
                "checkpoint.keep, or lower train.sdc_check.every"), error.agreed,
        )  # fmt: skip
    return checkpoint
