"""Says which part of a parameter a worker has, where the workers of a group divide it among them.

The engine notes it on each parameter where that is so, and at ZeRO-3 the shape, which DeepSpeed takes away. What a worker has is
a slice of the flat whole in the order of the division's `columns`, in every layout, so checkpoints load at any other.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from heliostat.checkpoint.columns import ROWS, Columns
from heliostat.checkpoint.flat_shard import FlatShard


class Division(NamedTuple):
    """Says which of so many equal parts of a parameter this worker has; the group's workers have all, in order.

    `width`: the columns of a matrix that is cut by them; 0 for what is cut in its first dimension.
    """

    part: int
    parts: int
    group: dist.ProcessGroup | None = None
    width: int = 0

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Copies this worker's part of a parameter; returns the tensor itself where nothing is divided."""
        return whole.chunk(self.parts, 1 if self.width else 0)[self.part].clone() if self.parts > 1 else whole

    @property
    def columns(self) -> Columns:
        return Columns(self.parts, self.width) if self.width else ROWS


WHOLE = Division(0, 1)


def of(parameter: torch.Tensor) -> Division:
    """Returns which part of a parameter this worker has."""
    return getattr(parameter, "division", WHOLE)


def note(parameter: torch.Tensor, shape: tuple[int, ...], division: Division = WHOLE) -> None:
    """Notes on a parameter the shape of the whole, and which part of it this worker has."""
    noted: Any = parameter
    noted.division, noted.whole_shape = division, shape


def shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of the whole parameter."""
    return tuple(getattr(parameter, "whole_shape", parameter.shape))


def numel(parameter: torch.Tensor) -> int:
    """Counts the elements of this worker's part of a parameter, before ZeRO shards it."""
    return math.prod(shape(parameter)) // of(parameter).parts


def placed(parameter: torch.Tensor, local: torch.Tensor, start: int) -> FlatShard:
    """Makes the slice of the whole parameter that `local` holds, from element `start` of this worker's part on."""
    mine, own = of(parameter), numel(parameter)
    return FlatShard(local, mine.part * own + start, mine.parts * own, mine.columns)


def assembled(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Puts together what each worker of a group has of a parameter, in its shape; returns the values for any other parameter.
    Collective."""
    mine = of(parameter)
    if mine.parts == 1:
        return values
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(mine.parts)]
    dist.all_gather(parts, values.contiguous(), group=mine.group)
    return torch.cat(parts, dim=1 if mine.width else 0)
