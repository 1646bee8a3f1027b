"""Runs the Ray Data streams that supply the workers of one attempt.

A small run has one stream. A run with many ranks has one stream per node, or per group of nodes.

The executor of a Ray Dataset is one thread, which takes 10 to 20 ms per block of 8 MB. So one stream delivers only 0.4 to 0.8
GB/s, even on many nodes. Consecutive blocks belong to consecutive ranks. So a stream reads complete windows if it serves at
least as many ranks as a window has blocks. No other stream then reads these windows, except at the ends of a stream's ranks,
where a window can be shared. The samples, their order, and their digests don't depend on the number of streams.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.data import DataIterator
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.data import stream
from heliostat.data.mixing import Shape
from heliostat.data.stream import Fetch

log = logging.getLogger(__name__)

START_S = 120.0  # seconds to wait for the actors that start the streams
LOOKED_AT = 1000  # windows over which `reads` averages


@dataclass(frozen=True)
class StreamLimits:
    """Holds the parameters of `stream.dataset` other than the task.

    `memory`: the maximum number of bytes in flight, for each stream separately.
    """

    memory: int
    sample_bytes: int
    labels: dict[str, str]

    def split(self, task: Fetch, ranks: int) -> list[DataIterator]:
        """Starts a Ray Data stream for `ranks` ranks, and returns an iterator over the blocks of each rank."""
        return stream.split(stream.dataset(task, max(2, ranks), self.memory, self.sample_bytes, self.labels), ranks)


class StreamKeeper:
    """Starts a stream in an actor and keeps it alive, because Ray ends a stream together with the process that started it."""

    def open(self, task: Fetch, ranks: int, limits: StreamLimits) -> list[DataIterator]:
        return limits.split(task, ranks)


class NodeStreams:
    """Owns the streams that supply an attempt's workers with data. `end` ends the streams."""

    def __init__(self, task: Fetch, ranks: int, limits: StreamLimits) -> None:
        """Prepares the streams. If one stream is enough for every placement of the ranks, starts this stream now, while the
        workers start.
        """
        self._task, self._limits = task, limits
        self._keepers: list[ActorHandle[StreamKeeper]] = []
        self._streams: list[list[DataIterator]] = []
        if len(groups([str(rank) for rank in range(ranks)], per_window(task.plan.shape))) == 1:
            self._streams.append(limits.split(task, ranks))

    def parts(self, nodes: Sequence[str]) -> list[DataIterator]:
        """Returns, for each rank, the iterator over the rank's blocks. Starts the streams that don't run yet. `nodes`: the node
        of each rank."""
        if self._streams:
            return self._streams[0]
        grouped = groups(nodes, per_window(self._task.plan.shape))
        if len(grouped) == 1:
            self._streams.append(self._limits.split(self._task, len(nodes)))
            return self._streams[0]
        log.info(
            "%d streams read the data; each shuffle window is read %.2f times on average",
            len(grouped),
            reads(grouped, self._task.plan.shape),
        )
        opening = []
        for ranks in grouped:
            here = NodeAffinitySchedulingStrategy(nodes[ranks[0]], soft=False)  # fails at once if the node is lost
            keeper: Any = Keeper.options(scheduling_strategy=here).remote()
            self._keepers.append(keeper)
            share = replace(self._task, ranks=(tuple(ranks), len(nodes)))
            opening.append(keeper.open.remote(share, len(ranks), self._limits))
        self._streams = ray.get(opening, timeout=START_S)
        by_rank = dict[int, DataIterator]()
        for mine, parts in zip(grouped, self._streams, strict=True):
            by_rank |= dict(zip(mine, parts, strict=True))
        return [by_rank[rank] for rank in range(len(nodes))]

    def end(self) -> None:
        """Ends all streams and their fetch tasks."""
        for parts in self._streams:
            stream.end(parts)
        for keeper in self._keepers:
            ray.kill(keeper)


Keeper = ray.remote(num_cpus=0)(StreamKeeper)


def per_window(shape: Shape) -> int:
    return shape.window // shape.block


def groups(nodes: Sequence[str], least: int) -> list[list[int]]:
    """Groups the ranks by node, in ascending order. Nodes are joined until a group has at least `least` ranks.

    `nodes`: the node of each rank.
    """
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    grouped = list[list[int]]()
    for ranks in by_node.values():
        if grouped and len(grouped[-1]) < least:
            grouped[-1] += ranks
        else:
            grouped.append(ranks)
    if len(grouped) > 1 and len(grouped[-1]) < least:
        last = grouped.pop()
        grouped[-1] += last
    return [sorted(ranks) for ranks in grouped]


def reads(grouped: Sequence[Sequence[int]], shape: Shape) -> float:
    """Computes how many streams read a window, on average. The result is 1 if the ranks of each group fill complete windows."""
    owner = {rank: group for group, ranks in enumerate(grouped) for rank in ranks}
    size = per_window(shape)
    windows = [range(first, first + size) for first in range(0, LOOKED_AT * size, size)]
    return sum(len({owner[n % shape.lanes % len(owner)] for n in blocks}) for blocks in windows) / len(windows)
