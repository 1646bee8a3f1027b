"""Makes all ranks agree: an error on one rank is raised on all ranks, so no rank waits for the others forever.

All ranks of the group call each function, in the same order. `group`: a gloo process group, or one of its channels.

Messages travel along a binomial tree of the ranks. Values go up to rank 0 and are merged on the way. The result goes down to all
ranks. With P ranks, a rank exchanges messages with at most log2(P) other ranks (rounded up), and a value makes at most log2(P)
hops in each direction. Ranks are numbered node by node. So if the number of ranks per node is a power of two, the lower branches
stay within a node. The upper branches connect the first ranks of the nodes. Values have the plain types that `wire` can encode.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist

from heliostat.errors import HeliostatError, TrainingError, WorkerError
from heliostat.storage import wire

T = TypeVar("T")

HEAD = 1024  # bytes of a value's first message; most values fit into it
SIZE = 8  # bytes at the start of the first message; they contain the value's size


@dataclass(frozen=True)
class Channel:
    """Describes a channel of a gloo group.

    Threads can use several channels of a group at once, if the channels have different tags.

    `timeout`: maximum time for one message; None means the group's timeout.
    """

    group: dist.ProcessGroup
    tag: int = 0
    timeout: timedelta | None = None


Group: TypeAlias = "dist.ProcessGroup | Channel"


def channel(group: Group) -> Channel:
    """Returns the argument if it is a channel. For a process group, returns its first channel."""
    return group if isinstance(group, Channel) else Channel(group)


@wire.travels
class RankOutcome(NamedTuple):
    """Holds the return value of a rank's work, or its error and the rank that raised it."""

    value: Any = None
    error: HeliostatError | None = None
    rank: int = -1


def together(group: Group, work: Callable[[], T]) -> list[T]:
    """Runs `work` on every rank and returns all results in rank order. If one rank fails, every rank raises its error."""
    return _share(group, _attempt(group, lambda: [work()]), operator.add, whole=True)


def agreed(group: Group, work: Callable[[], T]) -> T:
    """Runs `work` on every rank and returns this rank's result. If one rank fails, every rank raises its error."""
    mine = _attempt(group, work)
    _share(group, mine._replace(value=None), lambda *_: None, whole=False)
    return mine.value


def merged(group: Group, work: Callable[[], T], merge: Callable[[T, T], T]) -> T | None:
    """Runs `work` on every rank, and merges the results in rank order on their way to rank 0; other ranks get None.

    If one rank fails, every rank raises its error.
    """
    return _share(group, _attempt(group, work), merge, whole=False)


def first(group: Group, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 only and returns the result on every rank. If `work` fails, every rank raises its error."""
    where = channel(group)
    mine = _attempt(group, work) if dist.get_rank(where.group) == 0 else RankOutcome()
    return _result(mine, down(where, mine))


def _attempt(group: Group, work: Callable[[], T]) -> RankOutcome:
    rank = dist.get_rank(channel(group).group)
    try:
        return RankOutcome(work())
    except HeliostatError as e:
        return RankOutcome(error=e, rank=rank)
    except Exception as e:  # noqa: BLE001 (raised on every rank, below)
        fault = WorkerError(f"worker {dist.get_rank()}: {type(e).__name__}: {e}")
        fault.rank = dist.get_rank()
        fault.__cause__ = e
        return RankOutcome(error=fault, rank=rank)


def _share(group: Group, mine: RankOutcome, merge: Callable[[T, T], object], whole: bool) -> Any:
    """Merges all ranks' outcomes onto rank 0, and sends the error, if any, to all ranks.

    With `whole`, also sends the merged value to all ranks.
    """

    def join(one: RankOutcome, other: RankOutcome) -> RankOutcome:
        if one.error or other.error:
            return one if one.error else other
        return _attempt(group, lambda: merge(one.value, other.value))

    where = channel(group)
    total = up(where, mine, join)
    value = _result(mine, down(where, total if whole else total._replace(value=None)))
    return value if whole or dist.get_rank(where.group) else total.value


def _result(mine: RankOutcome, shared: RankOutcome) -> Any:
    if shared.error is not None:
        raise (mine.error or shared.error) if shared.rank == mine.rank else shared.error  # this rank's own error has its cause
    return shared.value


def parent(rank: int) -> int:
    return rank - (rank & -rank)


def children(rank: int, world: int) -> list[int]:
    """Lists a rank's children in the tree in ascending order.

    The branch of child n contains 2^n ranks, starting with the child.
    """
    reach = rank & -rank or world
    return [rank + (1 << n) for n in range(world.bit_length()) if 1 << n < reach and rank + (1 << n) < world]


def up(where: Channel, mine: T, merge: Callable[[T, T], T]) -> T:
    """Merges the values of all ranks in rank order.

    Rank 0 returns the merged value of all ranks. Other ranks return the merged value of their branch.
    """
    rank, world = dist.get_rank(where.group), dist.get_world_size(where.group)
    for child in children(rank, world):
        mine = merge(mine, cast("T", _receive(where, child)))
    if rank:
        _send(where, parent(rank), mine)
    return mine


def down(where: Channel, value: T) -> T:
    """Sends rank 0's value to all ranks, and returns this value."""
    rank, world = dist.get_rank(where.group), dist.get_world_size(where.group)
    if rank:
        value = cast("T", _receive(where, parent(rank)))
    for child in reversed(children(rank, world)):  # the longest branch first
        _send(where, child, value)
    return value


def _send(where: Channel, to: int, value: object) -> None:
    data = wire.pack(value)
    first = len(data).to_bytes(SIZE, "little") + data[: HEAD - SIZE]
    _put(where, to, first.ljust(HEAD, b"\0"))
    if rest := data[HEAD - SIZE :]:
        _put(where, to, rest)


def _receive(where: Channel, source: int) -> object:
    first = _get(where, source, HEAD)
    size = int.from_bytes(first[:SIZE], "little")
    if size > wire.MOST:
        raise TrainingError(f"worker {source} announced a message of {size:,} bytes, but the limit is {wire.MOST:,} bytes")
    data = first[SIZE : SIZE + size]
    if size > len(data):
        data += _get(where, source, size - len(data))
    return wire.unpack(data)


def _put(where: Channel, to: int, data: bytes) -> None:
    _wait(where, dist.isend(torch.frombuffer(bytearray(data), dtype=torch.uint8), group=where.group, tag=where.tag, group_dst=to))


def _get(where: Channel, source: int, size: int) -> bytes:
    got = torch.empty(size, dtype=torch.uint8)
    _wait(where, dist.irecv(got, group=where.group, tag=where.tag, group_src=source))
    return got.numpy().tobytes()


def _wait(where: Channel, work: dist.Work | None) -> None:
    assert work is not None  # this rank is in the group
    if where.timeout is None:
        work.wait()
    else:
        work.wait(where.timeout)
