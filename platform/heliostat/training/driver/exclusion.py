"""Decides which nodes get no workers any more: those that compute wrongly, and those on which workers fail again and again.

A node is excluded after two faults of its devices, or two failures without an explanation and without a new checkpoint between
them. It is excluded until the command ends, and only if other nodes have room for the run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from heliostat.config.spec import Job
from heliostat.errors import CorruptionError, DeviceError, HeliostatError, TrainingError

log = logging.getLogger(__name__)

FAILURES = 2  # of a node, after which it is excluded


class Suspicions:
    """Counts failures by the node that may be their cause."""

    def __init__(self) -> None:
        self._devices: Counter[str] = Counter()  # faults of devices, in the whole command
        self._unexplained: Counter[str] = Counter()  # other failures since the newest checkpoint
        self._checkpoint = -1

    def note(self, error: HeliostatError, checkpoint: int) -> list[str]:
        """Counts an attempt's failure; returns the nodes that are to be excluded. `checkpoint`: step of the newest one."""
        if isinstance(error, CorruptionError):
            return error.nodes
        if not isinstance(error, TrainingError):
            return []
        if checkpoint > self._checkpoint:
            self._checkpoint, self._unexplained = checkpoint, Counter()
        counts = self._devices if isinstance(error, DeviceError) else self._unexplained
        counts.update(error.suspects)
        return [node for node in error.suspects if self._devices[node] + self._unexplained[node] >= FAILURES]


def exclude(bad: Sequence[str], job: Job, count: int, pool: Any) -> str:
    """Gives these nodes no workers any more, if others have room for `count` of them; returns what was done, for people."""
    from heliostat.cluster import nodes

    avoid, names = pool.avoided() | set(bad), ", ".join(bad)
    held = {node: workers for node, workers in pool.held().items() if node not in avoid}
    if nodes.room_now(job, held, avoid) >= count:
        pool.avoid(bad, for_good=True)
        told = f"excluded until this command ends: node {names}; check its devices"
    else:
        told = f"no other nodes have room for {count} workers, so these stay in use: node {names}; check its devices"
    log.warning(told)
    return told
