"""Makes all ranks agree: an error on one of them is raised on all of them, so that none waits for the others for ever.

Each function is called by all ranks of the group, in the same order; what they tell each other goes along a tree (`tree`).
`group`: a gloo process group, or one channel of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from heliostat.checkpoint import tree
from heliostat.checkpoint.tree import Group
from heliostat.errors import HeliostatError, WorkerError
from heliostat.storage import wire

T = TypeVar("T")


@wire.travels
class RankOutcome(NamedTuple):
    """Holds what a rank's work returned, or what it raised and on which rank."""

    value: Any = None
    error: HeliostatError | None = None
    rank: int = -1


def together(group: Group, work: Callable[[], T]) -> list[T]:
    """Runs `work` on every rank and returns all results in rank order; if one fails, every rank raises its error."""
    return _share(group, _attempt(group, lambda: [work()]), operator.add, whole=True)


def agreed(group: Group, work: Callable[[], T]) -> T:
    """Runs `work` on every rank and returns this rank's result; if one fails, every rank raises its error."""
    mine = _attempt(group, work)
    _share(group, mine._replace(value=None), lambda *_: None, whole=False)
    return mine.value


def merged(group: Group, work: Callable[[], T], merge: Callable[[T, T], T]) -> T | None:
    """Runs `work` on every rank and merges the results in rank order on the way to rank 0; elsewhere this returns None.

    If one fails, every rank raises its error.
    """
    return _share(group, _attempt(group, work), merge, whole=False)


def first(group: Group, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 alone and returns its result on every rank; if it fails, every rank raises its error."""
    where = tree.channel(group)
    mine = _attempt(group, work) if dist.get_rank(where.group) == 0 else RankOutcome()
    return _result(mine, tree.down(where, mine))


def _attempt(group: Group, work: Callable[[], T]) -> RankOutcome:
    rank = dist.get_rank(tree.channel(group).group)
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
    """Merges all ranks' outcomes onto rank 0, and hands the error, and the `whole` if it is asked for, to all ranks."""

    def join(one: RankOutcome, other: RankOutcome) -> RankOutcome:
        if one.error or other.error:
            return one if one.error else other
        return _attempt(group, lambda: merge(one.value, other.value))

    where = tree.channel(group)
    total = tree.up(where, mine, join)
    value = _result(mine, tree.down(where, total if whole else total._replace(value=None)))
    return value if whole or dist.get_rank(where.group) else total.value


def _result(mine: RankOutcome, shared: RankOutcome) -> Any:
    if shared.error is not None:
        raise (mine.error or shared.error) if shared.rank == mine.rank else shared.error  # this rank's own has its cause
    return shared.value
