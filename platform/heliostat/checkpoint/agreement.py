"""Makes all ranks agree: an error on one of them is raised on all of them, so that none waits for the others for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from heliostat.errors import HeliostatError, WorkerError

T = TypeVar("T")


def together(group: Any, work: Callable[[], T]) -> list[T]:
    """Runs `work` on every rank of the group and returns all results in rank order; if one fails, every rank raises its error."""
    mine: tuple[T | None, HeliostatError | None]
    try:
        mine = work(), None
    except HeliostatError as e:
        mine = None, e
    except Exception as e:  # noqa: BLE001 (raised on every rank, below)
        fault = WorkerError(f"worker {dist.get_rank()}: {type(e).__name__}: {e}")
        fault.__cause__ = e
        mine = None, fault
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    for rank, (_, error) in enumerate(told):
        if error is not None:
            raise (mine[1] or error) if rank == dist.get_rank(group) else error  # this rank's own has its cause
    return [value for value, _ in told]
